"""HTML that is safe by construction: `tag` escapes every child and attribute that is not Html already."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from typing import Any

LONG_BREAK = re.compile(r"\n{3,}")
# Control characters have no place in a page: they are shown by their pictures (U+2400 and on).
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}


class Html(str):
    """Markup that goes into the page as it is."""

    __slots__ = ()


def escape(text: str) -> Html:
    """`text` as markup; Html is left alone. Lone surrogates, which UTF-8 can't hold, become question marks."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(text.translate(CONTROLS).encode("utf-8", "replace").decode()))


def join(children: Iterable[str], between: str = "") -> Html:
    """The children one after the other."""
    return Html(escape(between).join(map(escape, children)))


def tag(name: str, *children: str, **attributes: str | float | None) -> Html:
    """An element. `class_` is class, `data_group` is data-group; an attribute that is None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def data(value: Any) -> Html:
    """JSON for the page's script to read; no text in it can end the element that holds it."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json">{written}</script>')


def prose(text: str, limit: int = 1_200) -> Html:
    """What a model wrote: cut at `limit` characters, and long runs of newlines, which a page would not show, in words.

    Raises nothing: any text will do.
    """
    if not text:
        return tag("span", "(nothing)", class_="space")
    shown, cut = text[:limit], " …" if len(text) > limit else ""
    if not shown.strip():
        breaks = shown.count("\n")
        what = f"{breaks} newlines" if breaks == len(shown) else f"{len(shown)} blanks and newlines"
        return tag("span", f"({what})", class_="space")
    pieces, end = [], 0
    for found in LONG_BREAK.finditer(shown):
        pieces += [shown[end : found.start()], tag("span", f" ↵ × {len(found[0])}", class_="space"), "\n"]
        end = found.end()
    return join([*pieces, shown[end:], cut])


def facts(rows: Iterable[tuple[str, str]]) -> Html:
    """A list of names and values; a row without a value is left out."""
    return tag(
        "dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in rows if value), class_="facts"
    )


def table(header: Iterable[str], rows: Iterable[Iterable[str]], class_: str | None = None) -> Html:
    """A table whose first column names the row; it scrolls by itself where the page is narrow."""
    head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in header)))
    body = []
    for first, *others in rows:
        body.append(tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in others)))
    return tag("div", tag("table", head, tag("tbody", *body), class_=class_), class_="scroll")


def section(id_: str, title: str, lede: str, *children: str) -> Html:
    """A section of the page: its heading, a sentence on how to read it, and what it shows."""
    intro = [tag("p", lede, class_="lede")] if lede else []
    return tag("section", tag("h2", title), *intro, *children, id=id_)
