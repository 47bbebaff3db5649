"""stub"""

from typing import Any


def run(source: Any) -> None: ...
