"""What must be stored after a run of the torture, computed again without Embedline's own code, and compared row by row."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import psycopg
from tokenizers import Tokenizer

from embedline.models.health_check import PROBE_TEXT
from generated_names import Generated
from stub_provider import StubProvider
from support import MODELS, embed_static, scalar
from torture.script import PAIR, PARTED, PLAIN, Source
from working import unit_vectors

# Sizes of chunks: characters of plain's, whose model has no tokenizer; tokens of parted's.
PLAIN_CHARACTERS, PARTED_TOKENS = 120, 24
# Most that a component of a stored unit vector of 4-byte floats may differ from ours.
_TOLERANCE = 1e-4
# Suffixes of a pipeline's tables that are empty once everything is done.
_QUEUES = ("inbox", "outbox", "claim", "deleted", "hidden", "lent")

Key = tuple[object, ...]
Cut = Callable[[str], list[str]]


@dataclass
class Findings:
    """What a check has counted; a sound run has nothing but rows, chunks and what was paid."""

    rows: int = 0
    chunks: int = 0
    missing: int = 0
    stale: int = 0
    orphaned: int = 0
    twice: int = 0
    left: int = 0
    paid: int = 0
    over: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        """Everything that must not be."""
        return self.missing + self.stale + self.orphaned + self.twice + self.left

    def note(self, kind: str, what: object) -> None:
        """Count a fault, and keep the first ones to be shown."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.examples) < 20:
            self.examples.append(f"{kind}: {what}")


def cut_characters(text: str) -> list[str]:
    """Cut a text after every so many characters."""
    return [text[i : i + PLAIN_CHARACTERS] for i in range(0, len(text), PLAIN_CHARACTERS)]


@functools.cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(MODELS / "static-256" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def cut_tokens(text: str) -> list[str]:
    """Cut a text after every so many tokens, counted from each chunk's beginning."""
    found = []
    while text:
        end = len(text)
        starts = [start for start, _ in _tokenizer().encode(text, add_special_tokens=False).offsets]
        while len(starts) > PARTED_TOKENS:
            # What remains is counted again: a word that is cut has other tokens.
            end = starts[PARTED_TOKENS]
            starts = [start for start, _ in _tokenizer().encode(text[:end], add_special_tokens=False).offsets]
        found.append(text[:end])
        text = text[end:]
    return found


def cut_nothing(text: str) -> list[str]:
    """Return the text as its only chunk."""
    return [text]


CUTS: dict[str, Cut] = {PLAIN.name: cut_characters, PARTED.name: cut_tokens, PAIR.name: cut_nothing}


def check(connection: psycopg.Connection, dimensions: int) -> Findings:
    """Compare what is stored with what each row of the three sources asks for."""
    found = Findings()
    for source in (PLAIN, PARTED, PAIR):
        _check_source(connection, source, dimensions, found)
    dead = "SELECT count(*) FROM embedline.worker AS w WHERE NOT EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.pid = w.pid)"
    for _ in range(int(scalar(connection, dead))):
        found.note("left", "a worker that is dead")
    return found


def _check_source(connection: psycopg.Connection, source: Source, dimensions: int, found: Findings) -> None:
    table = Generated(source.name)
    for suffix in _QUEUES:
        for _ in range(int(scalar(connection, f"SELECT count(*) FROM {table(suffix)}"))):
            found.note("left", f"a row of {source.name}_{suffix}")
    ranges = "SELECT count(*) FROM embedline.backfill_range JOIN embedline.pipeline USING (pipeline_id)"
    for _ in range(int(scalar(connection, f"{ranges} WHERE name = %s AND NOT done", (source.name,)))):
        found.note("left", f"a range of the backfill of {source.name}")
    condition = " WHERE live" if source is PAIR else ""
    keys = ", ".join(source.keys)
    rows = {tuple(key): body for *key, body in connection.execute(f"SELECT {keys}, body FROM {source.name}{condition}")}
    found.rows += len(rows)
    stored = _stored(connection, source, found)
    wanted = {key: CUTS[source.name](body) for key, body in rows.items() if body is not None}
    _compare(source, wanted, stored, found)
    _compare_vectors(source, [pair for pairs in stored.values() for pair in pairs], dimensions, found)
    _compare_documents(connection, source, rows, found)
    _compare_view(connection, source, wanted, found)


def _stored(
    connection: psycopg.Connection, source: Source, found: Findings
) -> dict[Key, list[tuple[str, list[float] | None]]]:
    table, keys = Generated(source.name), ", ".join(f"c.key_{key}" for key in source.keys)
    query = (
        f"SELECT {keys}, c.seq, c.content, v.embedding_v1::real[] FROM {table('chunk')} AS c"
        f" LEFT JOIN {table('v1')} AS v USING (chunk_id) ORDER BY c.seq"
    )
    stored: dict[Key, list[tuple[str, list[float] | None]]] = {}
    places = Counter[tuple[object, ...]]()
    for *key, sequence, content, vector in connection.execute(query):
        places[(*key, sequence)] += 1
        stored.setdefault(tuple(key), []).append((content, vector))
    for place, count in places.items():
        if count > 1:
            found.note("twice", f"{source.name} {place}: {count} chunks")
    found.chunks += sum(places.values())
    alone = f"SELECT count(*) FROM {table('v1')} AS v WHERE NOT EXISTS (SELECT FROM {table('chunk')} AS c USING_ID)"
    for _ in range(int(scalar(connection, alone.replace("USING_ID", "WHERE c.chunk_id = v.chunk_id")))):
        found.note("orphaned", f"a vector of {source.name}")
    return stored


def _compare(
    source: Source,
    wanted: dict[Key, list[str]],
    stored: dict[Key, list[tuple[str, list[float] | None]]],
    found: Findings,
) -> None:
    for key, chunks in wanted.items():
        have = stored.get(key, [])
        if not have or any(vector is None for _, vector in have):
            found.note("missing", f"{source.name} {key}")
        elif [content for content, _ in have] != chunks:
            found.note("stale", f"{source.name} {key}: {[content for content, _ in have]} instead of {chunks}")
    for key in stored.keys() - wanted.keys():
        found.note("orphaned", f"chunks of {source.name} {key}")


def _compare_vectors(
    source: Source, pairs: Sequence[tuple[str, list[float] | None]], dimensions: int, found: Findings
) -> None:
    """Compare each vector with what the model gives for its chunk's text."""
    texts = [content.strip() for content, vector in pairs if vector is not None]
    if not texts:
        return
    if source is PARTED:
        matrix = embed_static(texts)
        expected = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    else:
        expected = unit_vectors(texts, dimensions)
    actual = np.array([vector for _, vector in pairs if vector is not None], dtype=np.float32)
    for place in np.flatnonzero(np.abs(actual - expected).max(axis=1) > _TOLERANCE):
        found.note("stale", f"the vector of {texts[place]!r} of {source.name}")


def _compare_documents(
    connection: psycopg.Connection, source: Source, rows: dict[Key, str | None], found: Findings
) -> None:
    keys = ", ".join(f"key_{key}" for key in source.keys)
    query = f"SELECT {keys}, state FROM {Generated(source.name)('document')}"
    states = {tuple(key): state for *key, state in connection.execute(query)}
    for key in states.keys() - rows.keys():
        found.note("orphaned", f"the document of {source.name} {key}")
    for key, body in rows.items():
        if states.get(key) != ("empty" if body is None else "embedded"):
            found.note("missing", f"{source.name} {key} is {states.get(key)}")


def _compare_view(
    connection: psycopg.Connection, source: Source, wanted: dict[Key, list[str]], found: Findings
) -> None:
    """Compare what a reader sees: one row of the routing view for each chunk."""
    keys = ", ".join(source.keys)
    query = f"SELECT {keys}, chunk FROM {source.name}_embedding ORDER BY chunk_seq"
    seen: dict[Key, list[str]] = {}
    for *key, chunk in connection.execute(query):
        seen.setdefault(tuple(key), []).append(chunk)
    for key in seen.keys() | wanted.keys():
        if seen.get(key) != wanted.get(key):
            found.note("stale", f"the view shows {seen.get(key)} of {source.name} {key}")


def check_spending(
    connection: psycopg.Connection, stub: StubProvider, backfilled_at: datetime | None, found: Findings
) -> None:
    """Count what the provider was paid for, and how often a text was paid for that no row asked for again.

    A committed write asks once for each of its row's chunks; `audit` has them all, as the sources' own triggers noted them.
    The backfill asks once more for what it finds, which is what was written until it was complete.
    """
    asked = Counter[str]()
    query = "SELECT body, count(*) + count(*) FILTER (WHERE at <= coalesce(%s, at)) FROM audit WHERE source = %s GROUP BY body"
    for source in (PLAIN, PAIR):
        for body, count in connection.execute(query, (backfilled_at, source.name)):
            for chunk in CUTS[source.name](body):
                asked[chunk.strip()] += count
    paid = {text: count for text, count in stub.texts_seen().items() if text != PROBE_TEXT}
    found.paid = sum(paid.values())
    over = {text: count - asked[text] for text, count in paid.items() if count > asked[text]}
    found.over = sum(over.values())
    found.examples += [f"paid {paid[text]} times, asked for {asked[text]} times: {text!r}" for text in list(over)[:10]]
