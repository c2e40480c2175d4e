"""Define the operations of revisions on versions and their indexes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from alembic.operations import Operations

from embedline.client.migrations.operations.base import Options, PipelineOperation


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
    """Index: build a version's index CONCURRENTLY, once its backfill is verified.

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


@Operations.register_operation("use_mode")
@dataclass(eq=False)
class UseModeOp(PipelineOperation):
    """Have searches of a version use a mode.

    As embedline.evaluate and embedline.use_mode.
    """

    operation: ClassVar[str] = "use_mode"
    pipeline: str
    version: int
    mode: str
    canaries: str | None = None
    k: int | None = None
    margin: float | None = None
    override_reason: str | None = None
    mode_before: str = "vector"

    @classmethod
    def use_mode(cls, operations: Operations, pipeline: str, *, version: int, mode: str, **options: Any) -> Any:
        """Compare the mode by the canaries, and have searches use it if it passes.

        Without canaries a pass must be stored, or `override_reason` be given.
        """
        return operations.invoke(cls(pipeline, version, mode, **options))

    def reverse(self) -> UseModeOp:
        """Use the mode of before, that of the vectors unless the operation names another."""
        return replace(self, mode=self.mode_before, mode_before=self.mode)
