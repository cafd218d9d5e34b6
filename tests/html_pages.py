"""Our HTML pages taken apart: what every one of them has to keep to."""

from __future__ import annotations

import html.parser


class Page(html.parser.HTMLParser):
    """The tags and the texts of a page; fails at what is not closed and at what could ask for something outside.

    Attributes:
      tags: In order.
      texts: What stands between them, without what is blank.
      open: The tags that are open where the parser is.
    """

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        if "url(" in text or "@import" in text:
            raise AssertionError("the style refers to something")
        self.feed(text)
        self.close()
        if self.open:
            raise AssertionError(f"not closed: {self.open}")

    def check(self, tag: str, attributes: dict[str, str | None]) -> None:
        """Fails at a tag that this page may not have, and notes what a test asks for."""
        raise NotImplementedError

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if any("://" in (value or "") for _, value in attributes):
            raise AssertionError(f"refers to something: {tag} {attributes}")
        self.check(tag, dict(attributes))
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if self.open.pop() != tag:
            raise AssertionError(f"{tag} ends where it was not opened")

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())
