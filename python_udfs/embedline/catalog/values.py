"""Models, pipelines and versions as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from embedline.chunking import ChunkingSpec
from embedline.core.embedding import ModelConfig
from embedline.core.sql_text import quote_ident
from embedline.postgres.relations import SEARCH_SCHEMA, data_name

# pgvector's operator and operator class of each distance; the class is prefixed with the column type.
OPERATORS = {"cosine": "<=>", "inner_product": "<#>", "l2": "<->"}
_OPERATOR_CLASSES = {"cosine": "cosine_ops", "inner_product": "ip_ops", "l2": "l2_ops"}


class WorkKey(NamedTuple):
    """Which work: the source rows of a pipeline, by its id, or the chunks that a version lacks, by that version's id."""

    kind: Literal["pipeline", "version"]
    number: int


@dataclass(frozen=True)
class Model:
    """A row of embedline.model; see the comments of its columns."""

    model_id: int
    config: ModelConfig
    max_tokens: int | None
    fingerprint: str
    probed_fingerprint: str | None = None
    batch_items: int | None = None
    batch_items_refused: int | None = None
    text_size_refused: int | None = None

    @property
    def request_items(self) -> int:
        """Texts that a request may carry: as many as declared, or fewer if the provider refused so many."""
        return min(self.config.max_batch_items, self.batch_items or self.config.max_batch_items)


@dataclass(frozen=True)
class Reach:
    """What a row of embedline.index_reach says of a version's search; see the comments of its columns."""

    checked_to: int
    ef_search: int | None
    wide_ef_search: int | None
    far_distance: float | None


@dataclass(frozen=True)
class Version:
    """A row of embedline.version with its model."""

    version_id: int
    number: int
    dimensions: int
    column_type: str
    distance: str
    index_method: str
    state: str
    model: Model
    fingerprint: str
    vectors_valid_from: str | None = None
    index_options: dict[str, object] = field(default_factory=dict)
    view_oid: int | None = None
    search_precision: str | None = None
    backfill_order: str = "oldest_first"
    backfill_rate: int | None = None
    # Whether a valid index of the vectors exists, and what it was found to reach; None before the first check.
    has_index: bool = False
    reach: Reach | None = None

    @property
    def column(self) -> str:
        """Name of the vector column."""
        return f"embedding_v{self.number}"

    @property
    def operator(self) -> str:
        """pgvector's distance operator."""
        return OPERATORS[self.distance]

    @property
    def operator_class(self) -> str:
        """pgvector's operator class for an index."""
        return f"{self.column_type}_{_OPERATOR_CLASSES[self.distance]}"

    @property
    def vector_type(self) -> str:
        """Type of the vector column with its dimensions."""
        return f"{self.column_type}({self.dimensions})"


@dataclass(frozen=True)
class ChunkSet:
    """A row of embedline.chunk_set: one way of cutting the contents, with a table of its own."""

    chunk_set_id: int
    number: int
    spec: ChunkingSpec


@dataclass(frozen=True)
class Pipeline:
    """A row of embedline.pipeline with one of its versions, the serving one unless another was asked for.

    `metered`, where workers loaded it: requests are counted, of remote models and of those with a price or a limit; and
    `is_hidden`: row-level security hides rows of the source from its owner, so that nothing can be read.
    `versions` are (version_id, number, chunk set) of all versions.
    """

    pipeline_id: int
    name: str
    source_oid: int
    view_oid: int | None
    key_columns: tuple[str, ...]
    key_types: tuple[str, ...]
    view_columns: dict[str, str]
    chunk_set: ChunkSet
    other_sets: tuple[ChunkSet, ...]
    document_prefix: str | None
    tenant: str | None
    weight: float
    metered: bool
    state: str
    generation: int
    recipe: int
    altered_at: str | None
    version: Version
    versions: tuple[tuple[int, int, int], ...]
    is_serving: bool = True
    # If a worker loaded it: the error that embedline.status shows of the pipeline, or embedline.versions of the version.
    last_error: str | None = None
    is_hidden: bool = False

    @property
    def spec(self) -> ChunkingSpec:
        """How the version's contents are chunked."""
        return self.chunk_set.spec

    def other_versions(self, chunk_set: int) -> list[int]:
        """Return the ids of the versions beside this one that embed the chunks of a set."""
        return [
            version_id
            for version_id, _, set_number in self.versions
            if set_number == chunk_set and version_id != self.version.version_id
        ]

    @property
    def has_prefix(self) -> bool:
        """Whether an expression gives each document a text to put before its chunks."""
        return self.document_prefix is not None

    def generated(self, suffix: str) -> str:
        """Return the qualified, quoted name of a generated object, such as the outbox."""
        return data_name(f"{self.name}_{suffix}")

    @cached_property
    def outbox(self) -> str:
        """The queue of changed keys."""
        return self.generated("outbox")

    @cached_property
    def document(self) -> str:
        """The state rows: one for each source row that was read."""
        return self.generated("document")

    def chunk_table(self, number: int) -> str:
        """Return the table of a chunk set."""
        return self.generated(chunk_table_suffix(number))

    @cached_property
    def chunk_tables(self) -> list[str]:
        """The tables of all chunk sets."""
        return [self.chunk_table(s.number) for s in (self.chunk_set, *self.other_sets)]

    @cached_property
    def chunk(self) -> str:
        """The chunks that the version embeds."""
        return self.chunk_table(self.chunk_set.number)

    @cached_property
    def vectors(self) -> str:
        """The version's table."""
        return self.generated(f"v{self.version.number}")

    @cached_property
    def exact(self) -> str:
        """The table of the version's vectors that every search ranks exactly."""
        return self.generated(f"v{self.version.number}_exact")

    def search_function(self, suffix: str) -> str:
        """Return the qualified, quoted name of a function that ranks the version's chunks; see search_functions."""
        return f"{SEARCH_SCHEMA}.{quote_ident(f'{self.name}_v{self.version.number}_{suffix}')}"

    @cached_property
    def key_list(self) -> str:
        """The key columns of the generated tables, comma separated."""
        return ", ".join(quote_ident(column) for column in self.key_columns)

    @cached_property
    def key_texts(self) -> str:
        """The key columns as one text[] value each row, to travel to Python and back without loss."""
        return "ARRAY[" + ", ".join(f"{quote_ident(column)}::text" for column in self.key_columns) + "]"

    @cached_property
    def quoted_key_columns(self) -> list[str]:
        """The key columns of the generated tables, each quoted."""
        return [quote_ident(column) for column in self.key_columns]

    def missing_rows(self, first_parameter: int = 1) -> str:
        """Call of the closing sweep with parameters from $n on: `row_limit` and `sweep_parameters`."""
        limit, recipe, valid_from, altered_at = range(first_parameter, first_parameter + 4)
        return (
            f"{self.generated('missing')}(${limit}, ${recipe}, ${valid_from}::timestamptz, ${altered_at}::timestamptz)"
        )

    def key_texts_of(self, alias: str) -> str:
        """`key_texts` with the columns qualified by a table alias."""
        return "ARRAY[" + ", ".join(f"{alias}.{quote_ident(column)}::text" for column in self.key_columns) + "]"

    def key_list_of(self, alias: str) -> str:
        """`key_list` with the columns qualified by a table alias."""
        return ", ".join(f"{alias}.{quote_ident(column)}" for column in self.key_columns)

    def key_arrays(self, first_parameter: int = 1) -> str:
        """Parameters $n::text[] of each key column, cast to arrays of the column's type."""
        return ", ".join(f"${first_parameter + i}::text[]::{key_type}[]" for i, key_type in enumerate(self.key_types))

    def key_join(self, left: str, right: str) -> str:
        """The condition that two relations hold the same key."""
        return " AND ".join(f"{left}.{quote_ident(c)} = {right}.{quote_ident(c)}" for c in self.key_columns)

    @property
    def key_parameter_types(self) -> list[str]:
        """Types of the parameters of `key_arrays`."""
        return ["text[]"] * len(self.key_columns)


def chunk_table_suffix(number: int) -> str:
    """Return what follows the pipeline's name in the name of a chunk set's table."""
    return "chunk" if number == 1 else f"chunk_{number}"
