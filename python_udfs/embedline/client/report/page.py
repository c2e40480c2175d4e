"""Write a report as one HTML file, which asks for nothing from elsewhere."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from embedline.client.report import quality, sections, words
from embedline.client.report.figures import Report


def render(report: Report) -> str:
    """Return the page.

    Every value is escaped; its policy forbids scripts and requests.
    """
    found = (
        sections.attention(report),
        sections.freshness(report),
        sections.throughput(report),
        quality.over_time(report),
        quality.evidence(report),
        sections.spending(report),
        sections.dead_letters(report),
        sections.sizes(report),
    )
    return _template().render(
        report=report,
        scope=report.scope,
        tiles=sections.tiles(report),
        sections=[section for section in found if section is not None],
        style=Markup(_text("page.css")),  # noqa: S704  a file of this package
        moment=words.moment,
        absent=words.ABSENT,
    )


def write(path: Path, page: str) -> None:
    """Write a page in one step.

    A reader of the old one never sees half of the new one. Raises OSError.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(page)
        umask = os.umask(0)
        os.umask(umask)
        # mkstemp closes the file to all others; a page is as open as any file that its writer makes.
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    return environment.from_string(_text("page.html.jinja"))


def _breakable(text: str) -> Markup:
    """Return a text whose lines may break after the underscores of a name."""
    return Markup("<wbr>").join(Markup.escape(part) for part in re.split(r"(?<=_)(?=\w)", text))


def _text(name: str) -> str:
    return resources.files("embedline.client.report").joinpath(name).read_text(encoding="utf-8")
