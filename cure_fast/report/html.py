"""Elements of SVG and the like as markup; other strings are escaped when they enter one."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape


def join(parts: Iterable[str]) -> Markup:
    """Return the pieces one after the other; plain strings are escaped."""
    return Markup("").join(parts)


def element(name: str, /, *content: str, **attributes: str | float | None) -> Markup:
    """Return one element with its children in order; plain strings are escaped.

    Attributes have ``_`` for ``-``, and a trailing ``_`` is dropped (``class_``); ``None`` leaves
    the attribute out.
    """
    written = [name]
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            written.append(f'{key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    return Markup(f"<{' '.join(written)}>") + join(content) + Markup(f"</{name}>")
