"""Markup that cannot be forged: every string is escaped unless this module made it.

`element` builds one HTML or SVG element. Children and attributes that are plain strings are data
and are escaped; only `Markup`, which nothing but this module makes, is taken as it is. So a name
in a trace or a plan never becomes a tag, whatever it contains.
"""

import html
from collections.abc import Iterable

VOID = frozenset({"br", "meta"})
LONGEST = 160  # characters of a name from a file


class Markup(str):
    """Text that is markup already."""


def element(_name: str, *children: object, **attributes: object) -> Markup:
    """One element. `class_` is the attribute class, `fill_opacity` is fill-opacity; None: none."""
    opening = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if _name in VOID:
        return Markup(f"<{_name}{opening}>")
    return Markup(f"<{_name}{opening}>{joined(children)}</{_name}>")


def joined(children: Iterable[object], between: str = "") -> Markup:
    """Several children, one after the other."""
    parts = (child if isinstance(child, Markup) else text(child) for child in children)
    return Markup(between.join(parts))


def text(value: object) -> Markup:
    """Data as text: escaped, unprintable characters (control, surrogates) shown as U+FFFD."""
    shown = number(value) if isinstance(value, float) else str(value)
    clean = "".join(c if c.isprintable() else "�" for c in shown)
    return Markup(html.escape(clean, quote=True))


def short(name: str) -> str:
    """A name from a file, cut where it is too long."""
    return name if len(name) <= LONGEST else name[:LONGEST] + "..."


def number(value: float) -> str:
    """A coordinate: two decimals are enough."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


def _attribute(value: object) -> str:
    return value if isinstance(value, Markup) else text(value)


def raw(value: str) -> Markup:
    """Constants of this package (style sheets, data URLs), never data of a file."""
    return Markup(value)
