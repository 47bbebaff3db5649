"""Messages of a chat -> one text.

A fixed form, by role, and no template of the checkpoint: those are programs (Jinja), and a program
that comes with a file is not run here. Whoever knows a model's own form writes it on the client and
sends it to /v1/completions.
"""

from collections.abc import Sequence


def plain(messages: Sequence[dict[str, str]]) -> str:
    """`role: text` a paragraph, and the beginning of the assistant's."""
    said = "".join(f"{message['role']}: {message['content']}\n\n" for message in messages)
    return f"{said}assistant:"
