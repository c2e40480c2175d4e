"""Compare chunkings on a sample of a pipeline's rows.

Queries whose answers are known are asked.

The sample has the rows that answer the queries, and random ones beside them. Each chunking cuts the same contents; the
pipeline's model embeds the chunks, and exact search ranks them. Contents are put together from stored chunks, through the
view of the version, so that the caller's rights decide which rows there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from embedline.catalog import progress
from embedline.catalog.load import load_pipeline
from embedline.catalog.modality import require_text
from embedline.catalog.rights import require_control
from embedline.catalog.values import Pipeline
from embedline.chunking import ChunkingSpec
from embedline.chunking.chunk import Span
from embedline.core import statistics, vectors
from embedline.core.prices import TOKENS_PER_PRICE
from embedline.core.processes import prepare_environment
from embedline.core.sql_text import quote_ident
from embedline.core.text import repair_text
from embedline.errors import InvalidParameter, NotReady, UnusableText
from embedline.estimate.answer_spans import Answers, Place, best_places, found_share, joined, query_blocks
from embedline.estimate.cut_sample import chunkings
from embedline.estimate.measure import count_tokens
from embedline.gate.queries import QuerySet, draw_places, key_parts, load_queries
from embedline.postgres.entry import calling_ours, entry_point, require_given
from embedline.postgres.session import Session
from embedline.search.exact_ranking import as_stored, distances
from embedline.search.query_batches import QueryVectors, embed_queries, key_expression
from embedline.search.ranking import version_view

_SAMPLE_ROWS = (10, 100_000)
_MOST_K = 1000
_MARGIN = 0.01
_CUT = "SELECT * FROM embedline._embed_chunkings($1, $2, $3, $4, $5)"
_PRICE = "SELECT price_per_million_tokens FROM embedline.model WHERE model_id = $1"
_HAS_ANSWER = """
    SELECT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = $1::regclass AND a.attname = 'answer'
        AND a.attnum > 0 AND NOT a.attisdropped)
"""


@dataclass(frozen=True)
class _Sample:
    """Documents of the sample: their keys, one chunk's id, and the repaired content."""

    keys: list[str]
    chunk_ids: list[int]
    contents: list[str]


@dataclass(frozen=True)
class _Questions:
    """Queries with the places of their answers, and a note about those left out."""

    texts: list[str]
    answers: list[Answers]
    note: str


@dataclass
class _Found:
    """The chunks of the sample by one chunking."""

    places: list[Place]
    tokens: list[int]
    parts: list[bytes]


@entry_point
def compare_chunkings(
    session: Session, name: str, specs: Any, canaries: str, k: int, sample_rows: int, seed: int, estimate_only: bool
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row for the pipeline's own chunking, and one for each of the others."""
    require_given(specs=specs, canaries=canaries, k=k, sample_rows=sample_rows, seed=seed)
    low, high = _SAMPLE_ROWS
    if not low <= sample_rows <= high:
        raise InvalidParameter(f"sample_rows must be between {low} and {high}, not {sample_rows}")
    if not 1 <= k <= _MOST_K:
        raise InvalidParameter(f"k must be between 1 and {_MOST_K}, not {k}")
    require_control(session, name)
    prepare_environment()
    pipeline = load_pipeline(session, name)
    require_text(pipeline, "a comparison of chunkings")
    compared = chunkings(pipeline, specs)
    with progress.reported(session, "compare_chunkings", pipeline):
        progress.report(session, "reading the queries", 0, None)
        queries = load_queries(session, [pipeline], canaries, 1, None, seed)
        sample = _draw(session, pipeline, queries, sample_rows, seed)
        questions = _questions(session, queries, sample, canaries)
        found = _cut(session, pipeline, specs, sample, len(compared), is_cut_only=bool(estimate_only))
        scores = None
        if not estimate_only:
            asked = embed_queries(session, pipeline, questions.texts)
            scores = [_scores(pipeline, asked, questions, cut, k) for cut in found]
    rows = _rows(session, pipeline, compared, found, sample)
    for number, row in enumerate(rows):
        row["detail"] = f"{len(sample.keys)} rows; {questions.note}" if number == 0 else None
        if scores is not None:
            row |= _compared(scores[0], scores[number], seed, is_own=number == 0)
    return rows


def _compared(own: statistics.FloatArray, other: statistics.FloatArray, seed: int, *, is_own: bool) -> dict[str, Any]:
    if is_own:
        return {"recall": float(own.mean()), "difference": None, "low": None, "high": None}
    judged = statistics.judge(own, other, _MARGIN, seed)
    return {"recall": judged.new, "difference": judged.difference, "low": judged.low, "high": judged.high}


def _draw(session: Session, pipeline: Pipeline, queries: QuerySet, rows: int, seed: int) -> _Sample:
    """Return the documents of the queries' answers, and random others up to `rows`."""
    wanted = dict.fromkeys(key for grades in queries.grades for key in grades)
    view, chunk_id = version_view(session, pipeline), f"e.{quote_ident(pipeline.view_columns['chunk_id'])}"
    if len(wanted) < rows:
        drawn = session.query(
            f"SELECT f.key FROM unnest($1) WITH ORDINALITY AS p (place, position) CROSS JOIN LATERAL ("
            f" SELECT {key_expression(pipeline, 'e')} AS key FROM {view} AS e WHERE {chunk_id} >= p.place"
            f" ORDER BY {chunk_id} LIMIT 1) AS f ORDER BY p.position",
            ["bigint[]"],
            draw_places(session, pipeline, rows * 2, seed),
        )
        for row in drawn:
            if len(wanted) < rows:
                wanted.setdefault(str(row["key"]))
    pieces: dict[str, list[tuple[int, str]]] = {}
    chunk_ids: dict[str, int] = {}
    for row in _chunks(session, pipeline, list(wanted)):
        pieces.setdefault(str(row["key"]), []).append((int(row["start"]), str(row["chunk"])))
        chunk_ids.setdefault(str(row["key"]), int(row["chunk_id"]))
    # A content of which a chunk was given up cannot be put together.
    whole = {key: text for key, found in pieces.items() if (text := joined(found)) is not None}
    return _Sample(list(whole), [chunk_ids[key] for key in whole], list(whole.values()))


def _chunks(session: Session, pipeline: Pipeline, keys: Sequence[str]) -> list[dict[str, Any]]:
    columns = {name: quote_ident(pipeline.view_columns[name]) for name in pipeline.view_columns}
    names = [columns[column] for column in pipeline.key_columns]
    parts = [key_parts(pipeline, key, "the sample") for key in keys]
    return session.query(
        f"""
        SELECT {key_expression(pipeline, "e")} AS key, e.{columns["chunk_id"]} AS chunk_id,
            e.{columns["chunk_start"]} AS start, e.{columns["chunk"]} AS chunk
        FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS g ({", ".join(names)}, embedline_position)
        JOIN {version_view(session, pipeline)} AS e ON {" AND ".join(f"e.{name} = g.{name}" for name in names)}
        ORDER BY g.embedline_position, e.{columns["chunk_start"]}
        """,
        pipeline.key_parameter_types,
        *([part[i] for part in parts] for i in range(len(names))),
    )


def _questions(session: Session, queries: QuerySet, sample: _Sample, canaries: str) -> _Questions:
    """Return the queries whose answers are in the sample.

    Raises NotReady if there are none.
    """
    number_of = {key: number for number, key in enumerate(sample.keys)}
    given = _given_answers(session, canaries)
    texts: list[str] = []
    answers: list[Answers] = []
    lost = 0
    for text, grades in zip(queries.words, queries.grades, strict=True):
        places: dict[int, list[Span]] = {}
        for key in grades:
            content = sample.contents[number_of[key]] if key in number_of else ""
            wanted = given.get((text, key), [])
            found = [(start, start + len(a)) for a in wanted if (start := content.find(a)) >= 0]
            lost += len(wanted) - len(found)
            if found or (content and not wanted):
                places[number_of[key]] = found
        if places:
            texts.append(text)
            answers.append(places)
    if not texts:
        raise NotReady(
            f"no answer of {canaries} stands in a row of the sample",
            hint="An answer is a part of the row's content, letter for letter; NULL counts the whole row.",
        )
    with_span = sum(any(places.values()) for places in answers)
    note = f"{len(texts)} queries, {with_span} with an answer's place"
    return _Questions(texts, answers, f"{note}; {lost} answers are not in their rows and left out" if lost else note)


def _given_answers(session: Session, canaries: str) -> dict[tuple[str, str], list[str]]:
    """Return the answers that stand in the table, by query and key."""
    if not session.scalar(_HAS_ANSWER, ["text"], canaries):
        return {}
    rows = session.execute(
        f"SELECT DISTINCT query::text, key::text, answer::text FROM {canaries} WHERE answer IS NOT NULL ORDER BY 1, 2, 3"
    )
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        try:
            answer = repair_text(str(row["answer"])).strip()
        except UnusableText as error:
            raise InvalidParameter(f"an answer in {canaries} has no text in it", hint="Leave it NULL.") from error
        found.setdefault((repair_text(str(row["query"])), str(row["key"])), []).append(answer)
    return found


def _cut(
    session: Session, pipeline: Pipeline, specs: Any, sample: _Sample, count: int, *, is_cut_only: bool
) -> list[_Found]:
    """Return the chunks of the sample by each chunking."""
    found = [_Found([], [], []) for _ in range(count)]
    with calling_ours(session):
        rows = session.query(
            _CUT, ["text", "jsonb", "bigint[]", "text[]", "boolean"],
            pipeline.name, specs, sample.chunk_ids, sample.contents, is_cut_only,
        )  # fmt: skip
    for row in rows:
        cut = found[int(row["spec"])]
        cut.places.append(Place(int(row["document"]), (int(row["chunk_start"]), int(row["chunk_end"]))))
        cut.tokens.append(int(row["tokens"]))
        if row["vector"] is not None:
            cut.parts.append(row["vector"])
    return found


def _scores(
    pipeline: Pipeline, asked: QueryVectors, questions: _Questions, cut: _Found, k: int
) -> statistics.FloatArray:
    """Return the share of its answers that each query finds among its k best chunks."""
    version = pipeline.version
    matrix = vectors.matrix_from_bytes(b"".join(cut.parts), len(cut.parts), version.dimensions)
    queries = as_stored(asked.matrix, version.column_type)
    scores = np.zeros(len(questions.texts))
    for block in query_blocks(len(questions.texts)):
        # A query or a chunk without a direction is near to nothing.
        with np.errstate(invalid="ignore", divide="ignore"):
            found = np.nan_to_num(distances(queries[block], matrix, version.distance), nan=np.inf)
        for row, places in enumerate(best_places(found, k)):
            number = block.start + row
            if asked.usable[number]:
                scores[number] = found_share([cut.places[place] for place in places], questions.answers[number])
    return scores


def _rows(
    session: Session, pipeline: Pipeline, compared: Sequence[ChunkingSpec], found: Sequence[_Found], sample: _Sample
) -> list[dict[str, Any]]:
    """Return sizes and cost of each chunking."""
    model_id = pipeline.version.model.model_id
    price = session.scalar(_PRICE, ["bigint"], model_id)
    tokenizer = session.scalar("SELECT tokenizer FROM embedline.model WHERE model_id = $1", ["bigint"], model_id)
    rows = []
    for spec, cut in zip(compared, found, strict=True):
        tokens = sum(cut.tokens)
        if spec.method == "semantic":
            tokens += round(count_tokens(tokenizer, sample.contents))
        count = max(len(cut.places), 1)
        money = None if price is None else str(Decimal(str(price)) * tokens / TOKENS_PER_PRICE)
        rows.append({
            "chunking": described(spec), "recall": None, "difference": None, "low": None, "high": None,
            "chunks": len(cut.places), "mean_tokens": sum(cut.tokens) / count,
            "mean_characters": sum(place.span[1] - place.span[0] for place in cut.places) / count,
            "tokens": tokens, "money": money,
        })  # fmt: skip
    return rows


def described(spec: ChunkingSpec) -> str:
    """Return a chunking in words: recursive 256, overlap 32."""
    parts = [spec.method if spec.tokens is None else f"{spec.method} {spec.tokens}"]
    parts += [f"overlap {spec.overlap}"] if spec.overlap else []
    return ", ".join([*parts, *(f"{name} {value:g}" for name, value in spec.options)])
