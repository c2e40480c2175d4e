"""The page of the demo of images has all pictures inside."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from embedline.dev.demo.contact_sheet import Hit, Query, write_sheet
from media_files import encoded


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_queries_and_hits(tmp_path: Path) -> None:
    png, jpeg = (encoded(Image.new("RGB", (4, 4), "red"), kind) for kind in ("PNG", "JPEG"))
    hits = [Hit(png, 'a "red" <square>', 0.5), Hit(jpeg, "another", 0.25)]
    path = tmp_path / "sheets/page.html"
    write_sheet(
        path,
        "Emoji & icons",
        "recall 0.5",
        [Query("<script>alert(1)</script>", None, hits), Query("red", jpeg, hits[:1])],
    )
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert "script" not in reader.tags
    assert "“<script>alert(1)</script>”" in reader.text and 'a "red" <square>' in reader.text and "0.250" in reader.text
    assert [image["alt"] for image in reader.images] == ['a "red" <square>', "another", "red", 'a "red" <square>']
    # Nothing is fetched.
    kinds = [str(image["src"]).split(";")[0] for image in reader.images]
    assert kinds == ["data:image/png", "data:image/jpeg", "data:image/jpeg", "data:image/png"]
    assert reader.tags.count("section") == 2
