"""Define the operations of revisions on models, pipelines and versions.

Each knows how it is undone. A field of an operation is a keyword of `op.<operation>`. Unless it is None, it is also a
parameter of the SQL function of the same meaning. None leaves a value to the function: its default, or the value of the
serving version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from alembic.operations import MigrateOperation, Operations

Options = Mapping[str, Any]


@dataclass(eq=False)
class PipelineOperation(MigrateOperation):
    """An operation on a model, a pipeline or a version.

    Its first field is written without its name.
    """

    operation: ClassVar[str]
    # Fields that travel with the operation, but are not arguments of it.
    unwritten: ClassVar[tuple[str, ...]] = ()

    def written(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as a revision writes them."""
        return {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in self.unwritten and (item.default is MISSING or getattr(self, item.name) != item.default)
        }

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return the tuple that `alembic check` prints."""
        return (self.operation, *self.written().values())


@Operations.register_operation("create_model")
@dataclass(eq=False)
class CreateModelOp(PipelineOperation):
    """Register a model; as embedline.create_model."""

    operation: ClassVar[str] = "create_model"
    name: str
    provider: str
    model: str
    dimensions: int | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    revision: str | None = None
    document_prefix: str | None = None
    query_prefix: str | None = None
    max_batch_items: int | None = None
    max_batch_tokens: int | None = None
    concurrency: int | None = None
    timeout_seconds: float | None = None
    options: Options | None = None
    price_per_million_tokens: float | None = None

    @classmethod
    def create_model(cls, operations: Operations, name: str, provider: str, model: str, **options: Any) -> Any:
        """Register a model that pipelines can embed with."""
        return operations.invoke(cls(name, provider, model, **options))

    def reverse(self) -> DropModelOp:
        """Forget the model."""
        return DropModelOp(self.name, self)


@Operations.register_operation("drop_model")
@dataclass(eq=False)
class DropModelOp(PipelineOperation):
    """Forget a model that no pipeline uses; as embedline.drop_model."""

    operation: ClassVar[str] = "drop_model"
    unwritten: ClassVar[tuple[str, ...]] = ("dropped",)
    name: str
    dropped: CreateModelOp | None = None

    @classmethod
    def drop_model(cls, operations: Operations, name: str) -> Any:
        """Forget a model that no pipeline uses."""
        return operations.invoke(cls(name))

    def reverse(self) -> CreateModelOp:
        """Register the model again, if its arguments are known."""
        if self.dropped is None:
            raise ValueError(
                f"op.drop_model({self.name!r}) does not say what the model was: write its downgrade yourself"
            )
        return self.dropped


@Operations.register_operation("create_pipeline")
@dataclass(eq=False)
class CreatePipelineOp(PipelineOperation):
    """Watch a table; as embedline.create_pipeline."""

    operation: ClassVar[str] = "create_pipeline"
    name: str
    source: str
    content: str
    model: str
    filter: str | None = None
    chunking: str | None = None
    chunk_tokens: int | None = None
    chunk_overlap: int | None = None
    chunking_options: Options | None = None
    column_type: str | None = None
    distance: str | None = None
    index_method: str | None = None
    index_options: Options | None = None
    capture: str | None = None
    document_prefix: str | None = None
    tenant: str | None = None
    weight: float | None = None
    expression_search_path: str | None = None

    @classmethod
    def create_pipeline(
        cls, operations: Operations, name: str, source: str, content: str, model: str, **options: Any
    ) -> Any:
        """Keep a table's embeddings true to its rows."""
        return operations.invoke(cls(name, source, content, model, **options))

    def reverse(self) -> DropPipelineOp:
        """Drop the pipeline with its vectors."""
        return DropPipelineOp(self.name, self)


@Operations.register_operation("drop_pipeline")
@dataclass(eq=False)
class DropPipelineOp(PipelineOperation):
    """Remove a pipeline with its vectors; as embedline.drop_pipeline."""

    operation: ClassVar[str] = "drop_pipeline"
    unwritten: ClassVar[tuple[str, ...]] = ("dropped",)
    name: str
    dropped: CreatePipelineOp | None = None

    @classmethod
    def drop_pipeline(cls, operations: Operations, name: str) -> Any:
        """Remove a pipeline with its vectors; the source table stays."""
        return operations.invoke(cls(name))

    def reverse(self) -> CreatePipelineOp:
        """Create the pipeline again, if its arguments are known.

        Workers then embed everything again.
        """
        if self.dropped is None:
            raise ValueError(
                f"op.drop_pipeline({self.name!r}) does not say what the pipeline was: write its downgrade yourself"
            )
        return self.dropped


@Operations.register_operation("alter_pipeline")
@dataclass(eq=False)
class AlterPipelineOp(PipelineOperation):
    """Change the expressions of a pipeline; as embedline.alter_pipeline.

    The model changes by a new version instead.
    """

    operation: ClassVar[str] = "alter_pipeline"
    unwritten: ClassVar[tuple[str, ...]] = ("before",)
    name: str
    content: str | None = None
    filter: str | None = None
    document_prefix: str | None = None
    tenant: str | None = None
    weight: float | None = None
    drop: Sequence[str] = ()
    expression_search_path: str | None = None
    before: Options = field(default_factory=dict)

    @classmethod
    def alter_pipeline(cls, operations: Operations, name: str, **options: Any) -> Any:
        """Change a pipeline's expressions or weight.

        None keeps a value; drop=["filter"] removes an optional one.
        """
        return operations.invoke(cls(name, **options))

    def reverse(self) -> AlterPipelineOp:
        """Restore the expressions."""
        after = {name: getattr(self, name) for name in self.before}
        kept = {name: value for name, value in self.before.items() if value is not None}
        drop = tuple(name for name, value in self.before.items() if value is None)
        return AlterPipelineOp(self.name, **kept, drop=drop, before=after)


@Operations.register_operation("move_pipeline")
@dataclass(eq=False)
class MovePipelineOp(PipelineOperation):
    """Watch another table of the same key and columns; as embedline.move_pipeline."""

    operation: ClassVar[str] = "move_pipeline"
    name: str
    new_source: str
    old_source: str | None = None

    @classmethod
    def move_pipeline(cls, operations: Operations, name: str, new_source: str, *, old_source: str | None = None) -> Any:
        """Watch another table; `old_source` is the table for a downgrade."""
        return operations.invoke(cls(name, new_source, old_source))

    def reverse(self) -> MovePipelineOp:
        """Watch the earlier table again, if the operation names it."""
        if self.old_source is None:
            raise ValueError(
                f"op.move_pipeline({self.name!r}, ...) does not say what the table was before: give old_source"
            )
        return MovePipelineOp(self.name, self.old_source, self.new_source)


@Operations.register_operation("alter_source")
@dataclass(eq=False)
class AlterSourceOp(PipelineOperation):
    """Change a source while the views of its pipelines are dropped.

    As embedline.alter_source.
    """

    operation: ClassVar[str] = "alter_source"
    source: str
    statement: str
    reverse_statement: str | None = None

    @classmethod
    def alter_source(
        cls, operations: Operations, source: str, statement: str, *, reverse_statement: str | None = None
    ) -> Any:
        """Change or drop a column that the views of a pipeline show.

        The views are recreated in the same transaction.
        """
        return operations.invoke(cls(source, statement, reverse_statement))

    def reverse(self) -> AlterSourceOp:
        """Run the statement that undoes the change, if the operation has one."""
        if self.reverse_statement is None:
            raise ValueError(
                f"op.alter_source({self.source!r}, ...) does not say how it is undone: give reverse_statement"
            )
        return AlterSourceOp(self.source, self.reverse_statement, self.statement)


@Operations.register_operation("add_embedding_version")
@dataclass(eq=False)
class AddEmbeddingVersionOp(PipelineOperation):
    """Expand: begin a version, its dual write and its backfill.

    As embedline.add_embedding_version.
    """

    operation: ClassVar[str] = "add_embedding_version"
    pipeline: str
    version: int
    model: str
    column_type: str | None = None
    distance: str | None = None
    index_method: str | None = None
    index_options: Options | None = None
    chunking: str | None = None
    chunk_tokens: int | None = None
    chunk_overlap: int | None = None
    chunking_options: Options | None = None
    backfill_order: str | None = None
    backfill_rate: int | None = None

    @classmethod
    def add_embedding_version(
        cls, operations: Operations, pipeline: str, *, version: int, model: str, **options: Any
    ) -> Any:
        """Begin version `version` of a pipeline.

        It is written from now on and workers fill it, but no search reads it yet.
        """
        return operations.invoke(cls(pipeline, version, model, **options))

    def reverse(self) -> DropEmbeddingVersionOp:
        """Drop the version, which does not serve, without a rollback window."""
        return DropEmbeddingVersionOp(self.pipeline, self.version, rollback_window="0 hours", added=self)


@Operations.register_operation("drop_embedding_version")
@dataclass(eq=False)
class DropEmbeddingVersionOp(PipelineOperation):
    """Contract: drop a version that does not serve.

    As embedline.drop_embedding_version.
    """

    operation: ClassVar[str] = "drop_embedding_version"
    unwritten: ClassVar[tuple[str, ...]] = ("added", "model", "registration")
    pipeline: str
    version: int
    rollback_window: str | None = None
    added: AddEmbeddingVersionOp | None = None
    model: str | None = None
    registration: Options | None = None

    @classmethod
    def drop_embedding_version(
        cls, operations: Operations, pipeline: str, *, version: int, rollback_window: str | None = None
    ) -> Any:
        """Drop a version's tables.

        Refused while the version serves, and before its rollback window has ended.
        """
        return operations.invoke(cls(pipeline, version, rollback_window))

    def reverse(self) -> AddEmbeddingVersionOp | RestoreEmbeddingVersionOp:
        """Begin the version again if it never served; otherwise it cannot be restored."""
        return self.added or RestoreEmbeddingVersionOp(self.pipeline, self.version, self.model, self.registration)


@Operations.register_operation("restore_embedding_version")
@dataclass(eq=False)
class RestoreEmbeddingVersionOp(PipelineOperation):
    """The downgrade of a contract: names the commands to run.

    Dropped vectors cannot be restored. `registration` are the arguments of create_model except the name, because the
    contract forgets the model.
    """

    operation: ClassVar[str] = "restore_embedding_version"
    pipeline: str
    version: int
    model: str | None = None
    registration: Options | None = None

    @classmethod
    def restore_embedding_version(
        cls,
        operations: Operations,
        pipeline: str,
        *,
        version: int,
        model: str | None = None,
        registration: Options | None = None,
    ) -> Any:
        """Pass if the version is still there; raise with the manual path if not."""
        return operations.invoke(cls(pipeline, version, model, registration))

    def reverse(self) -> DropEmbeddingVersionOp:
        """Drop the version."""
        return DropEmbeddingVersionOp(self.pipeline, self.version, model=self.model, registration=self.registration)


@Operations.register_operation("build_vector_index")
@dataclass(eq=False)
class BuildVectorIndexOp(PipelineOperation):
    """Index: build a version's HNSW index CONCURRENTLY, once its backfill is verified.

    As `embedline build-index`.
    """

    operation: ClassVar[str] = "build_vector_index"
    pipeline: str
    version: int
    wait_seconds: float = 0

    @classmethod
    def build_vector_index(cls, operations: Operations, pipeline: str, *, version: int, wait_seconds: float = 0) -> Any:
        """Build a version's index outside a transaction.

        Waits `wait_seconds` for the backfill, and refuses if it is not complete then.
        """
        return operations.invoke(cls(pipeline, version, wait_seconds))

    def reverse(self) -> DropVectorIndexOp:
        """Drop the index."""
        return DropVectorIndexOp(self.pipeline, self.version)


@Operations.register_operation("drop_vector_index")
@dataclass(eq=False)
class DropVectorIndexOp(PipelineOperation):
    """Drop the index of a version that does not serve."""

    operation: ClassVar[str] = "drop_vector_index"
    pipeline: str
    version: int

    @classmethod
    def drop_vector_index(cls, operations: Operations, pipeline: str, *, version: int) -> Any:
        """Drop a version's index CONCURRENTLY; refused while the version serves."""
        return operations.invoke(cls(pipeline, version))

    def reverse(self) -> BuildVectorIndexOp:
        """Build the index."""
        return BuildVectorIndexOp(self.pipeline, self.version)


@Operations.register_operation("cutover_embedding_version")
@dataclass(eq=False)
class CutoverEmbeddingVersionOp(PipelineOperation):
    """Cutover: let a version serve that passed its gate.

    As embedline.evaluate and embedline.cutover.
    """

    operation: ClassVar[str] = "cutover_embedding_version"
    pipeline: str
    version: int
    evaluate: bool = True
    canaries: str | None = None
    k: int | None = None
    margin: float | None = None
    query_count: int | None = None
    override_reason: str | None = None

    @classmethod
    def cutover_embedding_version(cls, operations: Operations, pipeline: str, *, version: int, **options: Any) -> Any:
        """Run the gate if no passing one is stored, then swap the view.

        The swap is a transaction of its own.
        """
        return operations.invoke(cls(pipeline, version, **options))

    def reverse(self) -> RollbackEmbeddingVersionOp:
        """Let the version before it serve again, at once."""
        return RollbackEmbeddingVersionOp(self.pipeline, self.version)


@Operations.register_operation("rollback_embedding_version")
@dataclass(eq=False)
class RollbackEmbeddingVersionOp(PipelineOperation):
    """Undo a cutover; as embedline.rollback."""

    operation: ClassVar[str] = "rollback_embedding_version"
    pipeline: str
    version: int

    @classmethod
    def rollback_embedding_version(cls, operations: Operations, pipeline: str, *, version: int) -> Any:
        """Let the version serve again that served before `version`.

        It has everything written since.
        """
        return operations.invoke(cls(pipeline, version))

    def reverse(self) -> CutoverEmbeddingVersionOp:
        """Let the version serve again."""
        return CutoverEmbeddingVersionOp(self.pipeline, self.version)
