"""HTML that is safe by construction: `tag` escapes every child and attribute that is not Html already."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from typing import Any

VOID = frozenset({"input", "meta"})  # elements without an end
BREAK = "↵ × "
LONG_BREAK = re.compile(r"\n{3,}")
# Control characters have no place in a page: they are shown by their pictures (U+2400 and on). Those that turn the
# direction of writing around would turn the page's own words too (https://www.trojansource.codes).
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
CONTROLS |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


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
    return Html(f"<{name}{written}>{join(children)}" + (f"</{name}>" if name not in VOID else ""))


def data(value: Any) -> Html:
    """JSON for the page's script to read; no text in it can end the element that holds it."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json">{written}</script>')


def compact(text: str, limit: int) -> str:
    """What a model wrote, cut at `limit` characters, with long runs of newlines counted."""
    if not text:
        return "(nothing)"
    shown, cut = text[:limit], " …" if len(text) > limit else ""
    if not shown.strip():
        breaks = shown.count("\n")
        return f"({breaks} newlines)" if breaks == len(shown) else f"({len(shown)} blanks and newlines)"
    return LONG_BREAK.sub(lambda found: f" {BREAK}{len(found[0])}\n", shown.strip("\n")) + cut


def prose(text: str, limit: int = 1_200) -> Html:
    """`compact` with what was not written by the model set apart."""
    if not text.strip():
        return tag("span", compact(text, limit), class_="space")
    pieces = re.split(rf"( {BREAK}\d+)", compact(text, limit))
    return join(tag("span", piece, class_="space") if index % 2 else piece for index, piece in enumerate(pieces))


def facts(rows: Iterable[tuple[str, str]]) -> Html:
    """A list of names and values; a row without a value is left out."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in rows if value), class_="facts")


def named(names: Iterable[tuple[str, str]]) -> Html:
    """Names with the first eight digits of what they stand for."""
    return join((join([name, " ", tag("code", digest[:8])]) for name, digest in names), ", ")


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
