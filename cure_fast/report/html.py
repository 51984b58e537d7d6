"""HTML and SVG elements; text that is not :class:`Html` is escaped when it enters one."""

from __future__ import annotations

import html

VOID = frozenset({"br", "col", "hr", "img", "link", "meta"})


class Html(str):
    """Text that is markup already; every other string is plain text and gets escaped."""

    __slots__ = ()


def join(parts: list[Html]) -> Html:
    """Return the pieces of markup one after the other."""
    return Html("".join(parts))


def element(name: str, /, *content: str, **attributes: str | float | bool | None) -> Html:
    """Return one element with its children in order; plain strings are escaped.

    Attributes have ``_`` for ``-``, and a trailing ``_`` is dropped (``class_``); ``None`` and
    ``False`` leave the attribute out, ``True`` writes its name alone.
    """
    written = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        written.append(label if value is True else f'{label}="{html.escape(text)}"')
    opening = f"<{' '.join(written)}>"
    if name in VOID:
        return Html(opening)
    inner = "".join(c if isinstance(c, Html) else html.escape(c) for c in content)
    return Html(f"{opening}{inner}</{name}>")


def table(
    header: list[str], rows: list[list[str]], *, caption: str, class_: str | None = None
) -> Html:
    """Return a table that scrolls sideways on narrow screens; the first cell of a row heads it."""
    head = [element("th", cell, scope="col") for cell in header]
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", c) for c in row[1:]))
        for row in rows
    ]
    parts = [element("thead", element("tr", *head)), element("tbody", *body)]
    whole = element("table", *parts, class_=class_, aria_label=caption)
    # The caption stays outside the scrolling box: on a narrow screen it would be cut off there.
    return join([element("p", caption, class_="caption"), scroll(whole, caption)])


def scroll(content: Html, label: str) -> Html:
    """Return content in a box that scrolls sideways, by keyboard too."""
    return element("div", content, class_="scroll", role="region", tabindex="0", aria_label=label)


def section(title: str, *content: str, anchor: str) -> Html:
    """Return a headed section."""
    heading = element("h2", title, id=f"{anchor}-title")
    return element("section", heading, *content, id=anchor, aria_labelledby=f"{anchor}-title")


def figure(title: str, caption: str, *content: str, class_: str | None = None) -> Html:
    """Return a titled figure with a caption below."""
    heading = element("h3", title)
    return element("figure", heading, *content, element("figcaption", caption), class_=class_)


def fold(summary: str, *content: str, open_: bool = False) -> Html:
    """Return content that folds away below its summary."""
    return element("details", element("summary", summary), *content, open=open_)


def callout(kind: str, title: str, *content: str) -> Html:
    """Return a marked box; ``kind`` is ``warning`` or ``note``."""
    return element(
        "div", element("p", element("strong", title)), *content, class_=f"callout {kind}"
    )


def paragraph(*content: str, class_: str | None = None) -> Html:
    """Return a paragraph."""
    return element("p", *content, class_=class_)


def code(text: str) -> Html:
    """Return inline code."""
    return element("code", text)


def bullets(items: list[str]) -> Html:
    """Return an unordered list."""
    return element("ul", *(element("li", item) for item in items))
