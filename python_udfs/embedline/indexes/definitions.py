"""Define the vector indexes that a version should have.

They are its column's own, and shadow indexes of less precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.ivfflat import default_lists
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.errors import NotFound
from embedline.postgres.relations import data_name, vector_schema
from embedline.postgres.session import Session

State = Literal["missing", "invalid", "building", "valid"]

_HAMMING = "bit_hamming_ops"
# ef_construction of an index whose version names none. With pgvector's default of 64, recall@10 on 100,000 package
# summaries was 0.978 at most, with ef_search 1,000. With 200 it reaches 0.99 at 400. A build takes 2.5 times as long
# (263 s against 105 s).
EF_CONSTRUCTION = 200
_PRECISIONS = """
    SELECT name, kind, dimensions, oversampling FROM embedline.precision_index WHERE version_id = $1 ORDER BY name
"""


@dataclass(frozen=True)
class VectorIndex:
    """An index over a version's vectors, of the column itself or of less precision.

    `precision` is None for the column itself. `operand` is the indexed expression, with `{}` for the vector; a search
    has to order by the very same expression. `element_type` and `dimensions` are those of the graph.
    """

    precision: str | None
    name: str
    operand: str
    operator: str
    operator_class: str
    element_type: str
    dimensions: int
    oversampling: float = 1.0
    # "hnsw" or "ivfflat".
    method: str = "hnsw"

    @property
    def qualified(self) -> str:
        """Return schema and name, quoted."""
        return data_name(self.name)


def own_index(pipeline: Pipeline, schema: str) -> VectorIndex:
    """Return the index of the column itself."""
    version = pipeline.version
    return VectorIndex(
        precision=None,
        name=names.vector_index(pipeline.name, version.number),
        operand="{}",
        operator=f"OPERATOR({schema}.{version.operator})",
        operator_class=f"{schema}.{version.operator_class}",
        element_type=version.column_type,
        dimensions=version.dimensions,
        method="ivfflat" if version.index_method == "ivfflat" else "hnsw",
    )


def precision_index(pipeline: Pipeline, schema: str, row: dict[str, Any]) -> VectorIndex:
    """Return a shadow index from its row in embedline.precision_index.

    The vector is cast to its type without dimensions first. Then the expression is the same over the table, a version's
    view and the routing view, whose column has no dimensions. So the planner finds the index through each of them.
    """
    version = pipeline.version
    kind, dimensions, column_type = str(row["kind"]), int(row["dimensions"]), version.column_type
    vector = f"{{}}::{schema}.{column_type}"
    opclass = version.operator_class.removeprefix(f"{column_type}_")
    operand, operator, operator_class, element_type = {
        "halfvec": (f"({vector}::{schema}.halfvec({dimensions}))", version.operator, f"halfvec_{opclass}", "halfvec"),
        "binary": (f"({schema}.binary_quantize({vector})::bit({dimensions}))", "<~>", _HAMMING, "bit"),
        "prefix": (
            f"({schema}.subvector({vector}, 1, {dimensions})::{schema}.{column_type}({dimensions}))",
            version.operator,
            version.operator_class,
            column_type,
        ),
    }[kind]
    return VectorIndex(
        precision=str(row["name"]),
        name=names.vector_index(pipeline.name, version.number, str(row["name"])),
        operand=operand,
        operator=f"OPERATOR({schema}.{operator})",
        operator_class=f"{schema}.{operator_class}",
        element_type=element_type,
        dimensions=dimensions,
        oversampling=float(row["oversampling"]),
    )


def load_indexes(session: Session, pipeline: Pipeline) -> list[VectorIndex]:
    """Return the indexes that `pipeline.version` should have, its column's own first."""
    schema = vector_schema(session)
    own = [] if pipeline.version.index_method == "none" else [own_index(pipeline, schema)]
    rows = session.query(_PRECISIONS, ["bigint"], pipeline.version.version_id)
    return own + [precision_index(pipeline, schema, row) for row in rows]


def find_index(session: Session, pipeline: Pipeline, precision: str | None) -> VectorIndex | None:
    """Return one of `load_indexes`; None for the column's own if there is none.

    Raises NotFound for an unknown precision.
    """
    indexes = load_indexes(session, pipeline)
    for index in indexes:
        if index.precision == precision:
            return index
    if precision is None:
        return None
    known = [f'"{index.precision}"' for index in indexes if index.precision is not None]
    raise NotFound(
        f'version {pipeline.version.number} of pipeline "{pipeline.name}" has no precision index "{precision}"',
        detail=f"It has {', '.join(known)}." if known else None,
        hint=f"SELECT embedline.add_precision_index({quote_literal(pipeline.name)}, {pipeline.version.number}, 'halfvec');",
    )


def index_state(session: Session, index: VectorIndex) -> State:
    """Return the state of the index: whether it exists and may be used."""
    state: State = session.scalar("SELECT embedline._index_state($1)", ["text"], index.name)
    return state


def wanted_lists(pipeline: Pipeline, count: int) -> int:
    """Return the number of lists of the version's IVFFlat index over `count` vectors."""
    return int(str(pipeline.version.index_options.get("lists", default_lists(count))))


def create_index_statement(
    pipeline: Pipeline, index: VectorIndex, count: int, *, method: str = "CREATE INDEX CONCURRENTLY"
) -> str:
    """Return the statement that creates one index over `count` vectors.

    By default it does not block writes.
    """
    given = pipeline.version.index_options
    if index.method == "ivfflat":
        chosen: dict[str, object] = {"lists": wanted_lists(pipeline, count)}
    else:
        # A shadow index is HNSW, and takes no options of another method.
        chosen = {"ef_construction": EF_CONSTRUCTION, **({} if "lists" in given else given)}
    options = ", ".join(f"{name} = {int(str(value))}" for name, value in sorted(chosen.items()))
    return (
        f"{method} IF NOT EXISTS {quote_ident(index.name)} ON {pipeline.vectors}"
        f" USING {index.method} ({index.operand.format(quote_ident(pipeline.version.column))} {index.operator_class})"
        f" WITH ({options})"
    )
