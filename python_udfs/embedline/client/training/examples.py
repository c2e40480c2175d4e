"""Make examples of pairs: a query, the chunk that answers it, and hard negatives."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedline.client.connection import Connection
from embedline.client.training.corpus import Corpus
from embedline.client.training.measuring import Matrix
from embedline.client.training.pairs import Pair
from embedline.core.query_hash import query_hash

Report = Callable[[int, int], None]
# Documents that are asked for beyond those needed, because some have the same text as the answer.
_SPARE = 5
_SEARCH = """
    SELECT key, chunk FROM embedline.search(%s, %s, %s, per_document => true, mode => %s)
"""


@dataclass(frozen=True)
class Example:
    """A query with one text that answers it and texts that do not."""

    query: str
    positive: str
    negatives: tuple[str, ...]


@dataclass(frozen=True)
class Sources:
    """The sources of examples: a pipeline's chunks, vectors and searches."""

    connection: Connection
    pipeline: str
    has_keywords: bool
    corpus: Corpus
    vectors: Matrix


def make_examples(
    sources: Sources, pairs: Sequence[Pair], queries: dict[str, Matrix], negatives: int, seed: int, report: Report
) -> list[Example]:
    """Return an example for each pair with a grade above 0.

    The positive text is the chunk of the pair's row that is nearest to the query by the base. `queries` has the base's
    vector of each query by its hash.
    """
    places = {key: place for place, key in enumerate(sources.corpus.documents)}
    by_query: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_query.setdefault(pair.hash, []).append(pair)
    # A search must not note the query as one of a user's; it notes none in a transaction that only reads.
    sources.connection.execute("SET default_transaction_read_only = on")
    try:
        found: list[Example] = []
        for number, (digest, of_query) in enumerate(by_query.items()):
            report(number, len(by_query))
            right = [pair for pair in of_query if pair.grade > 0]
            texts = [_nearest(sources, places[pair.key], queries[digest]) for pair in right]
            if not texts:
                continue
            wrong = [_nearest(sources, places[p.key], queries[digest]) for p in of_query if p.grade <= 0]
            hard = _negatives(sources, right, set(map(query_hash, texts)), wrong, negatives, seed)
            found += [Example(right[0].query, text, hard) for text in texts]
        report(len(by_query), len(by_query))
        return found
    finally:
        sources.connection.execute("RESET default_transaction_read_only")


def _nearest(sources: Sources, document: int, query: Matrix) -> str:
    chunks = sources.corpus.chunks_of(document)
    scores = sources.vectors[chunks.start : chunks.stop] @ query
    return sources.corpus.texts[chunks.start + int(np.argmax(scores))]


def _negatives(
    sources: Sources, right: Sequence[Pair], answers: set[str], wrong: Sequence[str], count: int, seed: int
) -> tuple[str, ...]:
    """Return texts of other rows: graded 0, best by words, best by vectors, then any."""
    keys = {pair.key for pair in right}
    others = len(sources.corpus.documents) - len(keys)
    found: dict[str, str] = {}
    wanted = min(count, others)
    candidates = _candidates(sources, right[0].query, keys, wrong, wanted, seed)
    for text in candidates if wanted else ():
        digest = query_hash(text)
        # A text that is the same but for its punctuation answers the query, too.
        if digest not in answers:
            found.setdefault(digest, text)
        if len(found) == wanted:
            break
    return tuple(found.values())


def _candidates(
    sources: Sources, query: str, keys: set[str], wrong: Sequence[str], wanted: int, seed: int
) -> Iterator[str]:
    yield from wrong
    for mode in ("keyword", "vector") if sources.has_keywords else ("vector",):
        asked = (sources.pipeline, query, wanted + len(keys) + _SPARE, mode)
        for key, chunk in sources.connection.execute(_SEARCH, asked, prepare=True).fetchall():
            if key not in keys:
                yield chunk
    draws = np.random.default_rng([seed, int(query_hash(query)[:8], 16)])
    for place in draws.permutation(len(sources.corpus.documents)).tolist()[: 10 * (wanted + 1)]:
        if sources.corpus.documents[place] not in keys:
            yield sources.corpus.texts[sources.corpus.chunks_of(place).start]


def same_width(examples: Sequence[Example]) -> int:
    """Return the number of negatives that every example has."""
    return min((len(example.negatives) for example in examples), default=0)


def examples_hash(examples: Sequence[Example]) -> str:
    """Return the SHA-256 (hex) of examples in their order."""
    return hashlib.sha256(_serialised(examples)).hexdigest()


def _serialised(examples: Sequence[Example]) -> bytes:
    lines = (json.dumps([e.query, e.positive, *e.negatives], ensure_ascii=True) for e in examples)
    return "\n".join(lines).encode()


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples for a resumed or repeated run; only their owner may read them."""
    part = path.with_suffix(".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
        file.write(_serialised(examples))
    part.rename(path)


def read_examples(path: Path) -> list[Example] | None:
    """Return the examples of a file, None if it is not there or not whole."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return [Example(query, positive, tuple(negatives)) for query, positive, *negatives in rows]
    except (OSError, EOFError, ValueError):
        return None
