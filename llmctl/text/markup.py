"""The text of an HTML page, by the standard library's parser."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class _Stripper(HTMLParser):
    """Collects a page's text: blocks on lines of their own, white space as a browser shows it, `pre` as it is."""

    DROPPED = frozenset({"script", "style", "template", "noscript", "svg", "math"})
    APART = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "blockquote", "table", "ul", "ol", "title"})
    BLOCKS = APART | {
        *(
            "address",
            "article",
            "aside",
            "body",
            "br",
            "dd",
            "div",
            "dl",
            "dt",
            "figcaption",
            "figure",
            "footer",
            "form",
        ),
        *("head", "header", "hr", "html", "li", "main", "nav", "option", "section", "td", "th", "tr"),
    }

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.dropping = self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.dropping += tag in self.DROPPED
        self.pre += tag == "pre"
        if tag in self.BLOCKS:
            self.pieces.append("\n\n" if tag in self.APART else "\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.dropping = max(0, self.dropping - (tag in self.DROPPED))
        self.pre = max(0, self.pre - (tag == "pre"))
        if tag in self.BLOCKS:
            self.pieces.append("\n\n" if tag in self.APART else "\n")

    def handle_data(self, data: str) -> None:
        if self.dropping:
            return
        if not self.pre:
            data = re.sub(r"\s+", " ", data)
            if not self.pieces or self.pieces[-1].endswith((" ", "\n")):
                data = data.lstrip(" ")
        if data:
            self.pieces.append(data)


def text_of_html(page: str) -> str:
    """The text of an HTML page: no tags, no scripts or styles, entities resolved."""
    stripper = _Stripper()
    stripper.feed(page)
    stripper.close()
    text = re.sub(r"[ \t]+$", "", "".join(stripper.pieces).replace("\xa0", " "), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"
