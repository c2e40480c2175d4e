"""Search pictures by words and by a picture, and upgrade the model that does it.

`make demo-images` trains two image towers on emoji at its first run, each beside the text model MiniLM. Both keep the
names of 200 emoji to themselves, so that searches for these show what the space has learned.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from embedline.client.build_index import PsycopgClient, build
from embedline.dev.demo.contact_sheet import Hit, Query, write_sheet
from embedline.dev.demo.emoji import HELD_OUT, Emoji, read_emoji, split
from embedline.dev.demo.icons import read_icons
from embedline.dev.demo.joint_space import Recipe, train, trained_with
from embedline.dev.demo.run import DemoFailed, headline, scalar

NAME = "emoji"
TOWERS: Mapping[str, Recipe] = {
    "emoji-small": Recipe(channels=(16, 32, 48), epochs=10),
    "emoji-joint": Recipe(),
}
_FIRST, _NEXT = TOWERS
_COMMENT = "Embedline demo: emoji and icons"
_PIPELINE = f"""
    SELECT embedline.create_pipeline('{NAME}', source => '{NAME}', content => 'picture', model => '{_FIRST}',
                                     modality => 'image', caption => 'name', keyword => 'english')
"""
_WORDS = ("a smiling face", "fruit", "something to drink", "bad weather", "a wild animal", "a folder of music")
_PICTURES = ("red apple", "dog face", "umbrella", "audio volume high")
# How well the demo must do: recall of held-out pairs by words and by a changed picture; chance is 0.05.
_LEAST_BY_WORDS, _LEAST_BY_PICTURE = 0.40, 0.95
_K, _SHOWN = 10, 8
_TIMED = 100
_STALLED_SECONDS = 300.0
_STATUS = "SELECT pending, backfill_complete, dead_letters, last_error FROM embedline.status WHERE pipeline = %s"
_VERSION = "SELECT state, chunks, vectors, last_error FROM embedline.versions WHERE pipeline = %s AND version = %s"
_SEARCH = "SELECT key, chunk, score FROM embedline.search(%s, {}, %s, filter => %s)"
_QUERY = {str: _SEARCH.format("%s::text"), bytes: _SEARCH.format("%s::bytea")}


@dataclass(frozen=True)
class _Row:
    """A row of the demo's table."""

    number: int
    name: str
    kind: str
    is_held_out: bool
    file: bytes


def run_images(dsn: str, models: Path, sheet: Path, console: Console) -> list[str]:
    """Run the whole demo; return its broken promises, an empty list if all were kept."""
    started = time.perf_counter()
    try:
        emoji, icons = read_emoji(), read_icons()
    except FileNotFoundError as error:
        raise DemoFailed(str(error)) from error
    _train_missing(emoji, models, console)
    rows = _rows(emoji, icons)
    with psycopg.connect(dsn, autocommit=True, application_name="embedline demo") as connection:
        headline(console, f"{len(emoji):,} emoji and {len(icons):,} icons, model {_FIRST}")
        _recreate(connection, models, rows, console)
        _fill(connection, len(rows), console)
        build(PsycopgClient(connection), NAME)
        shortfalls: list[str] = []
        _measure(connection, rows, console)
        number = _upgrade(connection, rows, console, shortfalls)
        found = _measure(connection, rows, console)
        if number and found["words"] < _LEAST_BY_WORDS:
            shortfalls.append(f"recall@{_K} by words is {found['words']:.3f}, not {_LEAST_BY_WORDS}")
        if number and found["picture"] < _LEAST_BY_PICTURE:
            shortfalls.append(f"recall@{_K} by a changed picture is {found['picture']:.3f}, not {_LEAST_BY_PICTURE}")
        times = _times(connection, rows)
        console.print(f"p95 of a search: {times} ({_TIMED} each)")
        queries = _show_searches(connection, rows, console)
    figures = f"recall@{_K} of held-out pairs by words {found['words']:.3f}; p95 {times}"
    write_sheet(sheet, f"Emoji and icons by {_NEXT}", figures, queries)
    headline(console, f"Done in {time.perf_counter() - started:.0f} s. Queries and hits as a page:")
    console.print(f"  [green]{escape(sheet.resolve().as_uri())}[/green]", soft_wrap=True)
    return shortfalls


def _train_missing(emoji: Sequence[Emoji], models: Path, console: Console) -> None:
    """Train the models that are not there, or were trained otherwise."""
    seen, _ = split(len(emoji))
    for name, recipe in TOWERS.items():
        if trained_with(models / name) == recipe:
            continue
        headline(console, f"Training {name} on {len(seen):,} emoji, once: {recipe.epochs} epochs")
        begun = time.perf_counter()
        try:
            train(emoji, seen, models / "minilm", models / name, recipe)
        except ImportError as error:
            raise DemoFailed(f"training needs torch: {error}; run make demo-images TORCH=1") from error
        console.print(f"  {time.perf_counter() - begun:.0f} s on one core")


def _rows(emoji: Sequence[Emoji], icons: Mapping[str, bytes]) -> list[_Row]:
    held_out = set(split(len(emoji))[1])
    rows = [_Row(number, one.name, "emoji", number in held_out, _file(one.picture)) for number, one in enumerate(emoji)]
    return rows + [
        _Row(number, name, "icon", False, file) for number, (name, file) in enumerate(icons.items(), len(rows))
    ]


def _file(picture: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _changed(file: bytes) -> bytes:
    """Return a picture as somebody else has it: smaller, a little turned, as a JPEG."""
    from PIL import Image

    picture = Image.open(io.BytesIO(file)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    turned = white.convert("RGB").rotate(5, Image.Resampling.BICUBIC, fillcolor="white")
    return _file(turned.resize((96, 96), Image.Resampling.LANCZOS), "JPEG", quality=80)


def _recreate(connection: psycopg.Connection[Any], models: Path, rows: Sequence[_Row], console: Console) -> None:
    """Recreate table, models and pipeline.

    A table of that name that is not the demo's is left alone.
    """
    table = sql.Identifier("public", NAME)
    comment = scalar(connection, "SELECT obj_description(to_regclass(%s))", [f"public.{NAME}"])
    if comment != _COMMENT and scalar(connection, "SELECT to_regclass(%s) IS NOT NULL", [f"public.{NAME}"]):
        raise DemoFailed(f"table public.{NAME} is not the demo's; rename it, or run the demo in another database")
    if scalar(connection, "SELECT count(*) FROM embedline.pipeline WHERE name = %s", [NAME]):
        connection.execute("SELECT embedline.drop_pipeline(%s)", (NAME,))
    connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table))
    connection.execute(
        sql.SQL(
            "CREATE TABLE {} (id bigint PRIMARY KEY, name text, kind text, held_out boolean, picture bytea)"
        ).format(table)
    )
    connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(table, _COMMENT))
    with connection.cursor() as cursor, cursor.copy(sql.SQL("COPY {} FROM STDIN").format(table)) as copy:
        for row in rows:
            copy.write_row((row.number, row.name, row.kind, row.is_held_out, row.file))
    connection.execute(sql.SQL("ANALYZE {}").format(table))
    for name in TOWERS:
        with contextlib.suppress(psycopg.errors.UndefinedObject):
            connection.execute("SELECT embedline.drop_model(%s)", (name,))
        statement = "SELECT embedline.create_model(%s, 'sentence-transformers', %s)"
        connection.execute(statement, (name, str(models / name)))
    connection.execute(_PIPELINE.encode())
    console.print(f"[green]{escape(' '.join(_PIPELINE.split()))};[/green]", soft_wrap=True)


def _fill(connection: psycopg.Connection[Any], count: int, console: Console) -> None:
    started = time.perf_counter()
    limit = time.monotonic() + _STALLED_SECONDS
    while True:
        connection.execute("SELECT embedline.embed_pending(1000, %s)", (NAME,))
        pending, complete, dead, last_error = connection.execute(_STATUS, (NAME,)).fetchone() or (0, False, 0, None)
        if complete and not pending:
            break
        if time.monotonic() > limit:
            raise DemoFailed(f"pictures were not embedded in {_STALLED_SECONDS:.0f} s; last error: {last_error}")
    seconds = time.perf_counter() - started
    vectors = scalar(connection, f"SELECT count(*) FROM {NAME}_embedding".encode())
    console.print(f"[bold]{vectors:,}[/bold] pictures embedded in {seconds:.1f} s, {vectors / seconds:,.0f} a second")
    if dead or vectors != count:
        raise DemoFailed(f"{count - vectors} of {count} pictures were not embedded; see embedline.dead_letter")


def _search(connection: psycopg.Connection[Any], query: str | bytes, filter_: str | None = None, k: int = _K) -> Any:
    return connection.execute(_QUERY[type(query)].encode(), (NAME, query, k, filter_)).fetchall()


def _measure(connection: psycopg.Connection[Any], rows: Sequence[_Row], console: Console) -> dict[str, float]:
    """Return the recall of pictures that no training has seen, among themselves."""
    held_out = [row for row in rows if row.is_held_out]
    asked: dict[str, list[str | bytes]] = {
        "words": [row.name for row in held_out],
        "picture": [_changed(row.file) for row in held_out],
    }
    found = {
        by: sum(
            str(row.number) in [key for key, _, _ in _search(connection, query, "held_out")]
            for row, query in zip(held_out, queries, strict=True)
        )
        / len(held_out)
        for by, queries in asked.items()
    }
    console.print(
        f"recall@{_K} of {HELD_OUT} held-out pairs: by name [bold]{found['words']:.3f}[/bold],"
        f" by a changed picture [bold]{found['picture']:.3f}[/bold] (chance {_K / HELD_OUT:.2f})"
    )
    return found


def _upgrade(connection: psycopg.Connection[Any], rows: Sequence[_Row], console: Console, shortfalls: list[str]) -> int:
    """Add a version of the other model, have it judged, and cut over.

    Returns its number, 0 if the gate refuses it.
    """
    headline(console, f"Upgrade: both towers of {_NEXT} at once, judged by words and by pictures")
    number = int(scalar(connection, "SELECT embedline.add_embedding_version(%s, %s)", (NAME, _NEXT)))
    limit = time.monotonic() + _STALLED_SECONDS
    while True:
        connection.execute("SELECT embedline.embed_pending(1000, %s)", (NAME,))
        state, _, _, last_error = connection.execute(_VERSION, (NAME, number)).fetchone() or (None,) * 4
        if state == "complete":
            break
        if time.monotonic() > limit:
            raise DemoFailed(f"version {number} was not filled; last error: {last_error}")
    build(PsycopgClient(connection), NAME, number)
    _create_canaries(connection, rows)
    table = Table()
    for column in ("measure", "old", "new", "verdict"):
        table.add_column(column, justify="left" if column in ("measure", "verdict") else "right")
    statement = "SELECT measure, old, new, verdict FROM embedline.evaluate(%s, %s, %s::regclass)"
    for measure, old, new, verdict in connection.execute(statement, (NAME, number, f"public.{NAME}_canary")).fetchall():
        table.add_row(measure, *("" if value is None else f"{value:.3f}" for value in (old, new)), verdict or "")
    console.print(table)
    verdict = scalar(
        connection, "SELECT gate FROM embedline.versions WHERE pipeline = %s AND version = %s", (NAME, number)
    )
    if verdict != "pass":
        shortfalls.append(f"the gate of {_NEXT} says {verdict}")
        return 0
    connection.execute("SELECT embedline.cutover(%s, %s)", (NAME, number))
    console.print(f"[green]SELECT embedline.cutover('{NAME}', {number});[/green]")
    return number


def _create_canaries(connection: psycopg.Connection[Any], rows: Sequence[_Row]) -> None:
    """Store a query by words and one by a changed picture for each held-out emoji."""
    table = sql.Identifier("public", f"{NAME}_canary")
    connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table))
    connection.execute(sql.SQL("CREATE TABLE {} (query text, file bytea, key text NOT NULL)").format(table))
    with connection.cursor() as cursor:
        statement = sql.SQL("INSERT INTO {} VALUES (%s, %s, %s)").format(table)
        for row in rows:
            if row.is_held_out:
                cursor.execute(statement, (row.name, None, str(row.number)))
                cursor.execute(statement, (None, _changed(row.file), str(row.number)))


def _times(connection: psycopg.Connection[Any], rows: Sequence[_Row]) -> str:
    """Return the p95 of searches by words and by a picture, as a text."""
    chosen = rows[:: max(1, len(rows) // _TIMED)][:_TIMED]
    asked: dict[str, list[str | bytes]] = {
        "by words": [f"a picture of {row.name}" for row in chosen],
        "by a picture": [_changed(row.file) for row in chosen],
    }
    shown = []
    for by, queries in asked.items():
        seconds = []
        for query in queries:
            begun = time.perf_counter()
            _search(connection, query)
            seconds.append(time.perf_counter() - begun)
        shown.append(f"{by} {sorted(seconds)[len(seconds) * 95 // 100 - 1] * 1000:.0f} ms")
    return ", ".join(shown)


def _show_searches(connection: psycopg.Connection[Any], rows: Sequence[_Row], console: Console) -> list[Query]:
    """Print searches, and return them for the page."""
    headline(console, "Searches by words and by a picture that was turned, made smaller and saved as a JPEG")
    by_name = {row.name: row for row in rows}
    asked: list[tuple[str, bytes | None]] = [(words, None) for words in _WORDS]
    asked += [(name, _changed(by_name[name].file)) for name in _PICTURES if name in by_name]
    queries = []
    for words, picture in asked:
        found = _search(connection, words if picture is None else picture, k=_SHOWN)
        hits = [Hit(rows[int(key)].file, caption, score) for key, caption, score in found]
        queries.append(Query(words, picture, hits))
        names = ", ".join(hit.caption for hit in hits[:4])
        console.print(
            f"  {'“' + words + '”' if picture is None else 'picture: ' + words}: [cyan]{escape(names)}[/cyan]"
        )
    return queries
