"""Write sql/README.md: every SQL object, its purpose, and its Python function.

`make golden` runs it. An object's purpose is the first sentence of its file's first comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SQL = Path(__file__).resolve().parents[3] / "sql"
_WORK = re.compile(r"from embedline\.([\w.]+) import (\w+)\n(?:.*\n)*?.*?\b\2\.(\w+)\(")
_NAME = re.compile(
    r"^CREATE (?:OR REPLACE )?(?:FUNCTION|PROCEDURE|VIEW|EVENT TRIGGER) (?:embedline\.)?(\w+)", re.MULTILINE
)
_HEAD = """\
# SQL objects

The SQL objects of the database, one per file; the file's name is the object's name. `alembic upgrade head` replays all of them,
each time, in the order functions, procedures, triggers, views, security. The revisions in `alembic/versions/` make the tables.
The body of a wrapper imports, calls and returns. The last column names the function in `python_udfs/embedline/` that does the
work. It has the name of the SQL object. `make golden` writes this page, and a test compares it with the files.
"""
_TRIGGERS = (SQL / "triggers" / "README.md").relative_to(SQL)
_NOTES = {
    "triggers": "The triggers of sources are generated for each pipeline, because their functions know the types of the source's"
    f" key. See [{_TRIGGERS}]({_TRIGGERS})."
}
_FOLDERS = ("functions", "procedures", "views", "triggers", "security")


@dataclass(frozen=True)
class SqlObject:
    """One file of sql/.

    It has its name under sql/, the object, its purpose, and its work as (module below embedline, function).
    """

    path: str
    name: str
    purpose: str
    work: tuple[str, str] | None


def sql_objects() -> Iterator[SqlObject]:
    """Yield the objects in the order of the page."""
    for folder in _FOLDERS:
        for path in sorted((SQL / folder).glob("*.sql"), key=_public_first):
            yield _read(path)


def _public_first(path: Path) -> tuple[bool, str]:
    return path.stem.startswith("_"), path.stem


def render() -> str:
    """Return the text of sql/README.md."""
    objects = list(sql_objects())
    parts = [_HEAD]
    for folder in _FOLDERS:
        note = f"\n{_NOTES[folder]}\n" if folder in _NOTES else ""
        rows = "\n".join(_row(found) for found in objects if found.path.startswith(f"{folder}/"))
        parts.append(f"\n## {folder.capitalize()}\n{note}\n| object | what it is for | work |\n|---|---|---|\n{rows}\n")
    return "".join(parts)


def _read(path: Path) -> SqlObject:
    text = path.read_text(encoding="utf-8")
    head = re.split(r"^(?!--)", text, maxsplit=1, flags=re.MULTILINE)[0]
    comment = " ".join(line.removeprefix("--").strip() for line in head.splitlines())
    purpose = re.split(r"(?<=\.)\s", comment, maxsplit=1)[0]
    work = _WORK.search(text)
    named = _NAME.search(text)
    relative = path.relative_to(SQL)
    name = path.stem if named is None else f"embedline.{named[1]}"
    found = (f"{work[1]}.{work[2]}", work[3]) if work else None
    return SqlObject(str(relative), name if relative.parts[0] != "security" else path.stem, purpose, found)


def _row(found: SqlObject) -> str:
    work = f"`{found.work[0]}.{found.work[1]}`" if found.work else "SQL"
    return f"| [`{found.name}`]({found.path}) | {found.purpose} | {work} |"


if __name__ == "__main__":
    (SQL / "README.md").write_text(render(), encoding="utf-8")
