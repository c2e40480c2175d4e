"""Define models, pipelines and versions as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from embedline.chunking import ChunkingSpec
from embedline.core import names
from embedline.core.embedding import ModelConfig
from embedline.core.media import Modality
from embedline.core.sql_text import quote_ident
from embedline.postgres.relations import SEARCH_SCHEMA, data_name

# pgvector's operator and operator class of each distance. The class is prefixed with the column type.
OPERATORS = {"cosine": "<=>", "inner_product": "<#>", "l2": "<->"}
_OPERATOR_CLASSES = {"cosine": "cosine_ops", "inner_product": "ip_ops", "l2": "l2_ops"}


class WorkKey(NamedTuple):
    """Names one kind of work: a pipeline's source rows, or a version's chunks.

    `number` is the id of the pipeline or of the version.
    """

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
    # What it makes vectors of: text, image, audio.
    modalities: tuple[str, ...] = ("text",)

    @property
    def has_towers(self) -> bool:
        """Return True if the model has a tower for each of several kinds of contents.

        Stored vectors are those of one tower, and tell nothing of the others.
        """
        return len(self.modalities) > 1

    @property
    def request_items(self) -> int:
        """Return the number of texts that a request may carry.

        It is the declared number, or less if the provider refused that many.
        """
        return min(self.config.max_batch_items, self.batch_items or self.config.max_batch_items)


@dataclass(frozen=True)
class Reach:
    """The measured recall of a version's search, a row of embedline.index_reach.

    See the comments of its columns. `effort` is hnsw.ef_search of an HNSW index, ivfflat.probes of an IVFFlat index.
    """

    checked_to: int
    effort: int | None
    wide_effort: int | None
    far_distance: float | None
    index_node: int | None = None


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
    # True if a valid index of the vectors exists; then its measured recall, None before the first check.
    has_index: bool = False
    reach: Reach | None = None
    # What search does without a mode: vector, keyword or hybrid.
    search_mode: str = "vector"

    @property
    def column(self) -> str:
        """Name of the vector column."""
        return names.vector_column(self.number)

    @property
    def operator(self) -> str:
        """Return pgvector's distance operator."""
        return OPERATORS[self.distance]

    @property
    def operator_class(self) -> str:
        """Return pgvector's operator class for an index."""
        return f"{self.column_type}_{_OPERATOR_CLASSES[self.distance]}"

    @property
    def vector_type(self) -> str:
        """Return the type of the vector column with its dimensions."""
        return f"{self.column_type}({self.dimensions})"


@dataclass(frozen=True)
class ChunkSet:
    """A row of embedline.chunk_set: one chunking of the contents, in its own table."""

    chunk_set_id: int
    number: int
    spec: ChunkingSpec


@dataclass(frozen=True)
class Pipeline:
    """A row of embedline.pipeline with one of its versions.

    That is the serving version unless another was asked for. `versions` are (version_id, number, chunk set) of all
    versions.

    Four fields are set only if workers loaded the pipeline. `metered`: requests are counted, because the model is remote
    or has a price or a limit. `is_hidden`: row-level security hides rows of the source from its owner, so that they
    cannot be read. `is_remote`: workers in the database leave it to remote workers. `has_bulk_rule`: some changes may wait for
    a provider's batch.
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
    # Whether workers in the database leave the embedding to remote workers.
    is_remote: bool = False
    has_bulk_rule: bool = False
    # The share of searches whose text is noted.
    query_sample_share: float = 0.0
    # The text search configuration of the keyword index, qualified; None without one.
    keyword: str | None = None
    # What the content is: text, image or audio.
    modality: Modality = "text"
    # Whether rows hold an address in place of the file.
    is_reference: bool = False

    @property
    def spec(self) -> ChunkingSpec:
        """Return the chunking of the version's contents."""
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
        """Return True if an expression gives each document a prefix for its chunks."""
        return self.document_prefix is not None

    def generated(self, suffix: str) -> str:
        """Return the qualified, quoted name of a generated object, such as the outbox."""
        return data_name(names.generated(self.name, suffix))

    @cached_property
    def outbox(self) -> str:
        """Return the table of changed keys that wait."""
        return self.generated("outbox")

    @cached_property
    def document(self) -> str:
        """Return the table of documents, one row for each source row that was read."""
        return self.generated("document")

    def chunk_table(self, number: int) -> str:
        """Return the table of a chunk set."""
        return self.generated(names.chunk_suffix(number))

    @cached_property
    def chunk_tables(self) -> list[str]:
        """Return the tables of all chunk sets."""
        return [self.chunk_table(s.number) for s in (self.chunk_set, *self.other_sets)]

    @cached_property
    def chunk(self) -> str:
        """Return the table of the chunks that the version embeds."""
        return self.chunk_table(self.chunk_set.number)

    @cached_property
    def vectors(self) -> str:
        """The version's table."""
        return self.generated(names.version_suffix(self.version.number))

    @cached_property
    def exact(self) -> str:
        """The table of the version's vectors that every search ranks exactly."""
        return self.generated(names.version_suffix(self.version.number, "exact"))

    def keyword_table(self, part: str, number: int | None = None) -> str:
        """Return a table of the keyword index: entry, segment or page.

        It is of the version's chunk set, or of the one with that number.
        """
        return self.generated(names.keyword_suffix(self.chunk_set.number if number is None else number, part))

    def search_function(self, suffix: str) -> str:
        """Return the qualified, quoted name of a function that ranks chunks.

        See pipelines.ddl.search_functions.
        """
        name = names.of_version(self.name, self.version.number, suffix)
        return f"{SEARCH_SCHEMA}.{quote_ident(name)}"

    @cached_property
    def key_list(self) -> str:
        """Return the key columns of the generated tables, comma separated."""
        return ", ".join(quote_ident(column) for column in self.key_columns)

    @cached_property
    def key_texts(self) -> str:
        """Return SQL for the key columns as one text[] value per row.

        In this form keys travel to Python and back without loss.
        """
        return "ARRAY[" + ", ".join(f"{quote_ident(column)}::text" for column in self.key_columns) + "]"

    @cached_property
    def quoted_key_columns(self) -> list[str]:
        """Return the key columns of the generated tables, each quoted."""
        return [quote_ident(column) for column in self.key_columns]

    def missing_rows(self, first_parameter: int = 1) -> str:
        """Return a call of the closing sweep with parameters from $n on.

        They are `row_limit` and `sweep_parameters`.
        """
        limit, recipe, valid_from, altered_at = range(first_parameter, first_parameter + 4)
        return (
            f"{self.generated('missing')}(${limit}, ${recipe}, ${valid_from}::timestamptz, ${altered_at}::timestamptz)"
        )

    def key_texts_of(self, alias: str) -> str:
        """Return `key_texts` with the columns qualified by a table alias."""
        return "ARRAY[" + ", ".join(f"{alias}.{quote_ident(column)}::text" for column in self.key_columns) + "]"

    def key_list_of(self, alias: str) -> str:
        """Return `key_list` with the columns qualified by a table alias."""
        return ", ".join(f"{alias}.{quote_ident(column)}" for column in self.key_columns)

    def key_arrays(self, first_parameter: int = 1) -> str:
        """Return parameters $n::text[] of each key column, cast to arrays of its type."""
        return ", ".join(f"${first_parameter + i}::text[]::{key_type}[]" for i, key_type in enumerate(self.key_types))

    def key_join(self, left: str, right: str) -> str:
        """Return the condition that two relations hold the same key."""
        return " AND ".join(f"{left}.{quote_ident(c)} = {right}.{quote_ident(c)}" for c in self.key_columns)

    @property
    def key_parameter_types(self) -> list[str]:
        """Return the types of the parameters of `key_arrays`."""
        return ["text[]"] * len(self.key_columns)
