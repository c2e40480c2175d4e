"""Define the operations of revisions on models, pipelines and their sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from alembic.operations import Operations

from embedline.client.migrations.operations.base import Options, PipelineOperation


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
    task: str | None = None

    @classmethod
    def create_model(cls, operations: Operations, name: str, provider: str, model: str, **options: Any) -> Any:
        """Register a model that pipelines can embed with, or a reranker."""
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
    keyword: str | None = None
    modality: str | None = None
    caption: str | None = None
    changed_by: str | None = None
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
    keyword: str | None = None
    caption: str | None = None
    changed_by: str | None = None
    drop: Sequence[str] = ()
    expression_search_path: str | None = None
    before: Options = field(default_factory=dict)

    @classmethod
    def alter_pipeline(cls, operations: Operations, name: str, **options: Any) -> Any:
        """Change a pipeline's expressions, weight or keyword index.

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
