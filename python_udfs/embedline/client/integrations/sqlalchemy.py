"""Map a routing view as a read-only class of SQLAlchemy, and call `search`.

`nearest` ranks by a scalar subquery: PostgreSQL runs it once, and the index over the vectors is used.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Float,
    Integer,
    MetaData,
    TableValuedAlias,
    Text,
    cast,
    column,
    event,
    func,
    literal,
    literal_column,
    select,
)
from sqlalchemy.orm import Mapped, declared_attr, mapped_column
from sqlalchemy.types import TypeEngine, UserDefinedType

from embedline.client.integrations.read_only import ReadOnlyView
from embedline.client.integrations.search_call import OPTIONS

__all__ = ["Embedding", "PipelineView", "ReadOnlyView", "search"]

_OPERATORS = {"cosine": "<=>", "inner_product": "<#>", "l2": "<->"}


class Embedding(UserDefinedType[str]):
    """The type of a pipeline's vectors; in Python a vector is PostgreSQL's text of it."""

    cache_ok = True

    def __init__(self, pipeline: str, distance: str = "cosine", type_name: str = "vector") -> None:
        """Take the pipeline's name, its distance, and `vector` or `halfvec`.

        Raises ValueError for another distance.
        """
        if distance not in _OPERATORS:
            raise ValueError(f"distance {distance} is none of {', '.join(_OPERATORS)}")
        self.pipeline, self.distance, self.type_name = pipeline, distance, type_name

    def get_col_spec(self, **_: Any) -> str:
        """Return the type's name in SQL."""
        return self.type_name

    class Comparator(TypeEngine.Comparator[str]):
        """Adds `nearest` to the column."""

        type: Embedding

        def nearest(self, query: str) -> ColumnElement[float]:
            """Return the distance to a text's vector, lower for nearer, to order by."""
            kind = self.type
            asked: ColumnElement[Any] = select(func.embedline.embed_query(kind.pipeline, query)).scalar_subquery()
            if kind.type_name != "vector":
                asked = cast(asked, kind)
            return self.expr.op(_OPERATORS[kind.distance], return_type=Float())(asked)

    comparator_factory = Comparator


class PipelineView:
    """A mixin for the class of a routing view; it stands before the declarative base.

    The class names the view (`__tablename__`), the pipeline (`__pipeline__`) and the columns of the source that it
    wants. The columns of the chunk come from here. Vectors are loaded only when they are read.
    """

    __pipeline__: ClassVar[str]
    __distance__: ClassVar[str] = "cosine"
    __column_type__: ClassVar[str] = "vector"
    # Apart from the application's tables, so that create_all() makes no table in place of the view.
    metadata = MetaData()

    chunk_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    chunk_seq: Mapped[int] = mapped_column(Integer)
    chunk_start: Mapped[int] = mapped_column(Integer)
    chunk_end: Mapped[int] = mapped_column(Integer)
    chunk: Mapped[str] = mapped_column(Text)

    @declared_attr
    def embedding(cls) -> Mapped[str]:
        """Return the column of the vectors."""
        if cls.metadata is not PipelineView.metadata:
            raise TypeError(f"class {cls.__name__}: PipelineView must stand before the declarative base")  # type: ignore[attr-defined]
        return mapped_column(Embedding(cls.__pipeline__, cls.__distance__, cls.__column_type__), deferred=True)


@event.listens_for(PipelineView, "before_insert", propagate=True)
@event.listens_for(PipelineView, "before_update", propagate=True)
@event.listens_for(PipelineView, "before_delete", propagate=True)
def _refuse(mapper: Any, connection: Any, target: Any) -> NoReturn:
    raise ReadOnlyView(f"{mapper.local_table.name} is read only: write to the source table")


def search(pipeline: str, query: str, k: int = 10, **options: Any) -> TableValuedAlias:
    """Return a call of `embedline.search` to select from.

    `options` are its further arguments. Raises TypeError for one that it has not.
    """
    unknown = sorted(set(options) - OPTIONS)
    if unknown:
        raise TypeError(f"embedline.search has no argument {', '.join(unknown)}")
    named = [literal_column(name).op("=>")(literal(value)) for name, value in options.items() if value is not None]
    call = func.embedline.search(pipeline, query, cast(literal(k), Integer), *named)
    return call.table_valued(
        column("key", Text),
        column("chunk", Text),
        column("score", Float),
        column("semantic_rank", Integer),
        column("keyword_rank", Integer),
        column("chunk_start", Integer),
        column("chunk_end", Integer),
        name="found",
    )
