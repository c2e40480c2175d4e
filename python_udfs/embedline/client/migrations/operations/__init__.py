"""The operations of revisions on models, pipelines and versions.

Each knows how it is undone. A field of an operation is a keyword of `op.<operation>`. Unless it is None, it is also a
parameter of the SQL function of the same meaning. None leaves a value to the function: its default, or the value of the
serving version.
"""

from embedline.client.migrations.operations.base import PipelineOperation
from embedline.client.migrations.operations.pipelines import (
    AlterPipelineOp,
    AlterSourceOp,
    CreateModelOp,
    CreatePipelineOp,
    DropModelOp,
    DropPipelineOp,
    MovePipelineOp,
)
from embedline.client.migrations.operations.versions import (
    AddEmbeddingVersionOp,
    BuildVectorIndexOp,
    CutoverEmbeddingVersionOp,
    DropEmbeddingVersionOp,
    DropVectorIndexOp,
    RestoreEmbeddingVersionOp,
    RollbackEmbeddingVersionOp,
    UseModeOp,
)

__all__ = [
    "AddEmbeddingVersionOp",
    "AlterPipelineOp",
    "AlterSourceOp",
    "BuildVectorIndexOp",
    "CreateModelOp",
    "CreatePipelineOp",
    "CutoverEmbeddingVersionOp",
    "DropEmbeddingVersionOp",
    "DropModelOp",
    "DropPipelineOp",
    "DropVectorIndexOp",
    "MovePipelineOp",
    "PipelineOperation",
    "RestoreEmbeddingVersionOp",
    "RollbackEmbeddingVersionOp",
    "UseModeOp",
]
