"""What the benches share: a database of their own, interleaved rounds, figures with targets, and the table of results."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("RESULTS.md")
DATABASE = "embedline_bench"
MODELS = ("static-256", "minilm")
# Figures in these are counts: shown without decimals.
_WHOLE_UNITS = ("blocks", "chunks", "ranges", "reads", "requests", "rows", "rows/s", "samples", "texts")


@dataclass(frozen=True)
class Figure:
    """One line of a bench's table; `measured` is compared with `limit` where there is one, in `unit`.

    The limit is the most that passes, or with `at_least` the least.
    """

    label: str
    measured: float
    unit: str
    limit: float | None = None
    detail: str = ""
    at_least: bool = False

    @property
    def target(self) -> str:
        """The limit as it is shown."""
        if self.limit is None:
            return ""
        return f"{'≥' if self.at_least else '≤'} {_value(self.limit, self.unit)}"

    @property
    def verdict(self) -> str:
        """PASS or FAIL; nothing where no target exists."""
        if self.limit is None:
            return ""
        held = self.measured >= self.limit if self.at_least else self.measured <= self.limit
        return "PASS" if held else "FAIL"


@dataclass
class Bench:
    """What a bench's `run` gets: where to connect, where the models are, where to put its figures."""

    dsn: str
    models: Path
    progress: Progress
    rounds: int
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def connect(self) -> psycopg.Connection[Any]:
        """Open a session as a client would; each statement is a transaction of its own."""
        return psycopg.connect(self.dsn, autocommit=True)

    def add(self, figure: Figure) -> None:
        """Put a line into the table."""
        self.figures.append(figure)

    def compare(
        self,
        label: str,
        ours: Sequence[float],
        baseline: Sequence[float],
        limit: float | None = None,
        average: Callable[[Sequence[float]], float] = statistics.median,
    ) -> None:
        """Add the ratio of two sides' averages; both sides are seconds of the same interleaved rounds."""
        mine, theirs = average(ours), average(baseline)
        pairs = sorted(a / b for a, b in zip(ours, baseline, strict=True))
        detail = f"{mine * 1000:.0f} ms against {theirs * 1000:.0f} ms; rounds {pairs[0]:.2f} to {pairs[-1]:.2f}"
        self.add(Figure(label, mine / theirs, "×", limit, detail))

    def note(self, text: str) -> None:
        """Keep a line of text, such as a plan, to be shown with the table."""
        self.notes.append(text)


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that `action` took."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest of `values` that at least `share` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(share * 100) // 100) - 1)]


def scalar(connection: psycopg.Connection[Any], statement: str, parameters: Sequence[object] = ()) -> Any:
    """Return the first column of the only row."""
    row = connection.execute(statement, parameters).fetchone()
    assert row is not None
    return row[0]


def recreate_database(dsn: str) -> str:
    """Make the bench database anew; return its connection string. No pg_cron there, so no worker takes part."""
    drop_database(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
    url = with_database(dsn, DATABASE)
    alembic = [sys.executable, "-m", "alembic", "-c", str(ROOT / "alembic.ini"), "upgrade", "head"]
    subprocess.run(
        alembic, env={**os.environ, "EMBEDLINE_DSN": url}, cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )  # a NOTICE that pg_cron is absent comes on stderr: here that is meant
    return url


def register_models(dsn: str, models: Path, embedder: str | None = None) -> None:
    """Register the two models; local ones start their hosts here.

    `embedder` is the base URL of an OpenAI-compatible endpoint that serves both under the same names.
    """
    local = "SELECT embedline.create_model(%s, 'sentence-transformers', %s)"
    remote = "SELECT embedline.create_model(%s, 'openai', %s, base_url => %s, options => %s::jsonb)"
    with psycopg.connect(dsn, autocommit=True) as connection:
        for name in MODELS:
            if embedder is None:
                connection.execute(local, (name, str(models / name)))
            else:
                # With the model's own tokenizer the chunks are those of the local model.
                tokenizer = models / name / "tokenizer.json"
                options = {"tokenizer": str(tokenizer)} if tokenizer.exists() else {}
                connection.execute(remote, (name, name, embedder, json.dumps(options)))


def drop_database(dsn: str) -> None:
    """Drop the bench database, whoever is connected."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(DATABASE)))


def with_database(dsn: str, database: str) -> str:
    """Return the connection URI with another database, still a URI: alembic takes nothing else."""
    from urllib.parse import quote, urlsplit, urlunsplit

    parts = urlsplit(dsn)
    if not parts.scheme:
        return make_conninfo(dsn, dbname=database)
    return urlunsplit(parts._replace(path="/" + quote(database)))


def machine_facts(dsn: str) -> str:
    """Say what the figures depend on."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        server = scalar(connection, "SHOW server_version").split()[0]
        vector = scalar(connection, "SELECT extversion FROM pg_extension WHERE extname = 'vector'")
        buffers = scalar(connection, "SHOW shared_buffers")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, PostgreSQL {server}, pgvector {vector}, shared_buffers {buffers}"


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """Show what a bench is at; goes away at the end, the table stays."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


def show(console: Console, name: str, bench: Bench, facts: str) -> None:
    """Print the bench's notes and its table."""
    for note in bench.notes:
        console.print(note, markup=False, highlight=False)
    table = Table(title=f"{name} · {facts}", title_justify="left")
    for column in ("what", "measured", "target", "verdict", "detail"):
        table.add_column(column, justify="right" if column in ("measured", "target") else "left")
    for figure in bench.figures:
        colour = {"PASS": "green", "FAIL": "red"}.get(figure.verdict, "")
        table.add_row(
            figure.label,
            _value(figure.measured, figure.unit),
            figure.target,
            f"[{colour}]{figure.verdict}[/]" if colour else "",
            figure.detail,
        )
    console.print(table)


def save(name: str, bench: Bench, facts: str, command: str) -> None:
    """Put the bench's section into RESULTS.md, in place of its last one."""
    lines = [f"## {name}", "", f"`{command}`, {date.today().isoformat()}, {facts}.", ""]
    lines += ["| what | measured | target | verdict | detail |", "|---|--:|--:|---|---|"]
    for figure in bench.figures:
        cells = (figure.label, _value(figure.measured, figure.unit), figure.target, figure.verdict, figure.detail)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if bench.notes:
        lines += ["", "```", *bench.notes, "```"]
    title = (
        "# Results of the benches\n\n"
        "Written by `--save`; ratios are of medians (index: of means), both sides measured in turn in one run.\n"
    )
    old = RESULTS.read_text() if RESULTS.exists() else title
    head, *sections = old.split("\n## ")
    kept = {section.split("\n", 1)[0].strip(): section.rstrip() for section in sections}
    kept[name] = "\n".join(lines)[3:]
    body = "\n\n".join(f"## {kept[section]}" for section in sorted(kept))
    RESULTS.write_text(f"{head.rstrip()}\n\n{body}\n")


def _value(value: float, unit: str) -> str:
    digits = 2 if unit == "×" else 0 if unit in _WHOLE_UNITS else 1
    return f"{value:,.{digits}f} {unit}".rstrip()
