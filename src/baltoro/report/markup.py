"""HTML that is safe by construction: every plain string is escaped, only what `el` made is taken as markup.

Documents, pages and everything a model writes are untrusted.
"""

from collections.abc import Iterable
from html import escape

_VOID = {"img", "meta", "br"}


class Html(str):
    """Markup. An f-string or `+` around it gives a plain string again, which `el` escapes: mistakes show, not run."""

    __slots__ = ()


def join(parts: Iterable[str]) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def el(tag: str, /, *children: str, **attributes: object) -> Html:
    """One element. `class_` is written as class and `aria_label` as aria-label; an attribute of None is left out."""
    head = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{head}>" if tag in _VOID else f"<{tag}{head}>{join(children)}</{tag}>")


def table(head: Iterable[str], rows: Iterable[Iterable[str]], caption: str = "") -> Html:
    """The first cell of each row is its header. Wide tables scroll inside their box."""
    lines = [
        el("tr", *(cell if _is_cell(cell) else el("th" if i == 0 else "td", cell) for i, cell in enumerate(row)))
        for row in rows
    ]
    title = el("caption", caption) if caption else Html()
    body = el("table", title, el("thead", el("tr", *(el("th", cell) for cell in head))), el("tbody", *lines))
    return el("div", body, class_="scroll", tabindex=0, role="region", aria_label=caption or "table")


def _is_cell(cell: str) -> bool:
    return isinstance(cell, Html) and cell.startswith(("<td", "<th"))


def media(frames: object, alt: str) -> Html:
    """A picture, or a clip as a strip of frames. Only inline PNG is shown, whatever the file says."""
    uris = [str(uri) for uri in frames] if isinstance(frames, list) else []  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if not uris or not all(uri.startswith("data:image/png;base64,") for uri in uris):
        return el("span", "[picture not kept]", class_="missing")
    of = f" of {len(uris)}"
    return el(
        "span",
        *(
            el("img", src=uri, alt=alt if len(uris) == 1 else f"frame {i}{of}: {alt}" if i == 1 else f"frame {i}{of}")
            for i, uri in enumerate(uris, 1)
        ),
        class_="strip" if len(uris) > 1 else "picture",
    )
