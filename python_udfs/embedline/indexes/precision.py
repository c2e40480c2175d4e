"""Manage shadow indexes: the same vectors in less precision.

A search may rank with one and rerank by the whole vectors. An index of halfvec is half as large, one of signs (binary)
a thirty-second of the vectors. One of a shorter prefix (Matryoshka) is as small as the prefix. Each finds
`oversampling` times the rows wanted, which the whole vectors then rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from embedline.catalog.load import load_version
from embedline.catalog.rights import require_control
from embedline.catalog.values import Pipeline
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.core.storage_size import INDEX_DIMENSIONS
from embedline.errors import AlreadyExists, InvalidParameter, NotReady
from embedline.indexes.cron_jobs import forget_index_jobs
from embedline.indexes.definitions import VectorIndex, find_index, index_state, load_indexes, own_index
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.locks import bound_lock_wait
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session

# pgvector's bound of hnsw.ef_search, which is the number of rows that a scan finds before it starts again.
MAX_EF_SEARCH = 1000
_MIN_EF_SEARCH = 40
_KINDS = ("halfvec", "binary", "prefix")
_BYTES = """
    SELECT pg_relation_size(c.oid) FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relname = $1 AND n.nspname = 'embedline_data'
"""


@dataclass(frozen=True)
class Candidate:
    """A valid index of a version, with its size in bytes.

    `name` is None for the column's own.
    """

    name: str | None
    index: VectorIndex
    bytes: int


def candidates(session: Session, pipeline: Pipeline) -> list[Candidate]:
    """Return the indexes of `pipeline.version` that a search could use now.

    The column's own comes first.
    """
    return [
        Candidate(index.precision, index, _bytes(session, index))
        for index in load_indexes(session, pipeline)
        if index_state(session, index) == "valid"
    ]


def chosen_index(session: Session, pipeline: Pipeline) -> VectorIndex:
    """Return the index that search ranks `pipeline.version` with.

    It is the one of `use_precision`, else the column's own. The column's own is returned even if the version has no
    index at all, because its statement is an exact search then.
    """
    if pipeline.version.search_precision is not None:
        index = find_index(session, pipeline, pipeline.version.search_precision)
        if index is not None and index_state(session, index) == "valid":
            return index
    return own_index(pipeline, vector_schema(session))


def candidate_count(index: VectorIndex, k: int) -> int:
    """Return the number of rows that the index has to find for the k best of them."""
    return k if index.precision is None else min(max(k, math.ceil(k * index.oversampling)), max(k, MAX_EF_SEARCH))


def ef_search(index: VectorIndex, k: int) -> int:
    """Return hnsw.ef_search for the k best.

    The column's own index needs twice the rows wanted, a shadow index all candidates.
    """
    count = candidate_count(index, k)
    # Twice the rows: recall@10 of the manual's index terms was 0.768 with 40 for 40 rows, 0.780 with 80 (exact 0.793).
    return min(max(_MIN_EF_SEARCH, 2 * count if index.precision is None else count), MAX_EF_SEARCH)


@dataclass(frozen=True)
class RankedRelation:
    """A relation whose rows are ranked by their vectors.

    `shown` has the columns to return, name to expression.
    """

    relation: str
    embedding: str
    shown: Mapping[str, str]


def ranked_rows(
    session: Session,
    pipeline: Pipeline,
    index: VectorIndex,
    ranked: RankedRelation,
    limit: int,
    *,
    is_exact: bool = False,
) -> str:
    """Return the query of the nearest `limit` rows of a relation; $1 is the vector.

    Its columns are those shown, and distance. A shadow index finds the candidates and the whole vectors
    rank them. `is_exact` keeps the planner from any index.
    """
    relation, embedding, shown = ranked.relation, ranked.embedding, ranked.shown
    schema = vector_schema(session)
    query = f"$1::{schema}.{pipeline.version.vector_type}"
    operator = own_index(pipeline, schema).operator
    columns = ", ".join(f"{expression} AS {quote_ident(column)}" for column, expression in shown.items())
    distance = f"{embedding} {operator} {query}"
    if is_exact or index.precision is None:
        # No index has the sum as its expression.
        order = f"({distance}) + 0::double precision" if is_exact else distance
        return f"SELECT {columns}, {distance} AS distance FROM {relation} ORDER BY {order} LIMIT {limit}"
    approximate = f"{index.operand.format(embedding)} {index.operator} {index.operand.format(query)}"
    found = (
        f"SELECT {columns}, {embedding} AS embedline_vector FROM {relation} ORDER BY {approximate}"
        f" LIMIT {candidate_count(index, limit)}"
    )
    kept = ", ".join(f"c.{quote_ident(column)}" for column in shown)
    return (
        f"SELECT {kept}, c.embedline_vector {operator} {query} AS distance FROM ({found}) AS c"
        f" ORDER BY c.embedline_vector {operator} {query} LIMIT {limit}"
    )


def _bytes(session: Session, index: VectorIndex) -> int:
    return int(session.scalar(_BYTES, ["name"], index.name))


def _controlled(session: Session, name: str, number: int) -> Pipeline:
    require_control(session, name)
    return load_version(session, name, number)


@entry_point
def add_precision_index(
    session: Session, name: str, number: int, kind: str, dimensions: int | None, oversampling: float
) -> str:
    """Declare a shadow index of a version and return its name.

    It is built as the version's own index is.
    """
    pipeline = _controlled(session, name, number)
    if kind not in _KINDS:
        raise InvalidParameter(f'kind "{kind}" is not known', hint=f"Use one of {', '.join(_KINDS)}.")
    require_given(oversampling=oversampling)
    if not 1 <= oversampling <= 100:
        raise InvalidParameter(f"oversampling must be between 1 and 100, not {oversampling:g}")
    width = _width(pipeline, kind, dimensions)
    precision = f"prefix_{width}" if kind == "prefix" else kind
    inserted = session.query(
        "INSERT INTO embedline.precision_index (version_id, name, kind, dimensions, oversampling)"
        " VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING RETURNING name",
        ["bigint", "text", "text", "integer", "real"],
        pipeline.version.version_id, precision, kind, width, oversampling,
    )  # fmt: skip
    if not inserted:
        raise AlreadyExists(
            f'version {number} of pipeline "{name}" has precision index "{precision}" already',
            hint=f"SELECT embedline.drop_precision_index({quote_literal(name)}, {number}, '{precision}'); removes it.",
        )
    return precision


def _width(pipeline: Pipeline, kind: str, dimensions: int | None) -> int:
    """Return the dimensions of such an index.

    They are checked against those of the vectors and the limits of pgvector.
    """
    version = pipeline.version
    whole = version.dimensions
    if kind == "halfvec" and version.column_type == "halfvec":
        raise InvalidParameter(
            f"the vectors of version {version.number} are halfvec already", hint="Use kind 'binary' or 'prefix'."
        )
    if kind != "prefix":
        if dimensions not in (None, whole):
            raise InvalidParameter(
                f"a {kind} index has all {whole} dimensions",
                hint="Use kind 'prefix' for fewer, and no dimensions here.",
            )
        _require_indexable(whole, "bit" if kind == "binary" else "halfvec")
        return whole
    if dimensions is None or not 1 <= dimensions < whole:
        raise InvalidParameter(
            f"a prefix has 1 to {whole - 1} of the {whole} dimensions",
            hint="Use a length that the model was trained for (Matryoshka), for example dimensions => 256.",
        )
    _require_indexable(dimensions, version.column_type)
    return dimensions


def _require_indexable(dimensions: int, element_type: str) -> None:
    if dimensions > INDEX_DIMENSIONS[element_type]:
        hint = "Use kind 'halfvec', which is indexed up to 4,000 dimensions, 'binary', or a shorter prefix."
        raise InvalidParameter(
            f"HNSW indexes {element_type} up to {INDEX_DIMENSIONS[element_type]:,} dimensions; {dimensions:,} are too many",
            hint=hint,
        )


@entry_point
def drop_precision_index(session: Session, name: str, number: int, precision: str) -> None:
    """Drop a shadow index.

    Takes ACCESS EXCLUSIVE on the version's table for an instant.
    """
    pipeline = _controlled(session, name, number)
    index = find_index(session, pipeline, precision)
    if index is None or index.precision is None:
        raise InvalidParameter("name must not be NULL")
    if pipeline.version.search_precision == precision:
        raise NotReady(
            f'search uses precision index "{precision}"',
            hint=f"SELECT embedline.use_precision({quote_literal(name)}, {number}, NULL);",
        )
    bound_lock_wait(session)
    forget_index_jobs(session, name, number, precision)
    session.execute(f"DROP INDEX IF EXISTS {index.qualified}")
    session.query(
        "DELETE FROM embedline.precision_index WHERE version_id = $1 AND name = $2",
        ["bigint", "text"], pipeline.version.version_id, precision,
    )  # fmt: skip


@entry_point
def use_precision(session: Session, name: str, number: int, precision: str | None) -> None:
    """Have search rank a version with one of its shadow indexes.

    None selects the index of the column itself.
    """
    pipeline = _controlled(session, name, number)
    index = find_index(session, pipeline, precision)
    if precision is not None and index is not None and index_state(session, index) != "valid":
        raise NotReady(
            f"index {index.name} is not built",
            hint=f"SELECT embedline.build_vector_index({quote_literal(name)}, {number}); or from a shell:"
            f" embedline build-index {name} --version {number} --precision {precision}",
        )
    session.query(
        "UPDATE embedline.version SET search_precision = $2 WHERE version_id = $1",
        ["bigint", "text"], pipeline.version.version_id, precision,
    )  # fmt: skip
