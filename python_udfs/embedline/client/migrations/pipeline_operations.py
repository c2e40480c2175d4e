"""Run the operations on models and pipelines.

Online each checks the database first, so that a chain that was killed can be run again; offline it renders SQL.

Alembic writes its version table in the transaction of the migration. Operations on models and pipelines stay in it, so
all succeed or none. Those on versions commit on their own, so that no lock outlives its statement, and the next run
finds them done.
"""

from __future__ import annotations

from alembic.operations import Operations

from embedline.client.migrations import operations as ops
from embedline.client.migrations.catalogue import is_configuration, is_installed, with_address
from embedline.client.migrations.execution import MODEL, is_offline, look, require_installed, require_same, run, scalar
from embedline.client.migrations.statements import Cast, call, literal

_PIPELINE = """
    SELECT to_jsonb(p) || jsonb_build_object('keyword_names', jsonb_build_array(p.keyword, p.keyword::regconfig::text),
        'source', p.source::oid = to_regclass(:source), 'model', m.name,
        'content', p.content_expression, 'filter', p.filter_expression, 'tenant', p.tenant_expression,
        'document_prefix', CASE p.modality WHEN 'text' THEN p.document_prefix_expression END,
        'caption', CASE WHEN p.modality <> 'text' THEN p.document_prefix_expression END,
        'column_type', v.column_type, 'distance', v.distance,
        'index_method', v.index_method, 'index_options', v.index_options, 'chunking', s.chunking,
        'chunk_tokens', s.chunk_tokens, 'chunk_overlap', s.chunk_overlap, 'chunking_options', s.chunking_options)
    FROM embedline.pipeline AS p JOIN embedline.version AS v ON v.version_id = p.serving_version_id
    JOIN embedline.model AS m USING (model_id)
    JOIN embedline.chunk_set AS s ON s.pipeline_id = p.pipeline_id AND s.number = v.chunk_set
    WHERE p.name = :name
"""
_WATCHED = "SELECT EXISTS (SELECT FROM embedline.pipeline AS p WHERE p.source::oid = to_regclass(:source))"


@Operations.implementation_for(ops.CreateModelOp)
def create_model(operations: Operations, operation: ops.CreateModelOp) -> None:
    """Register the model unless the same one is there."""
    arguments = operation.written()
    if not is_offline(operations):
        require_installed(operations)
        existing = look(operations, MODEL, name=operation.name)
        if existing is not None:
            require_same(f'model "{operation.name}"', arguments, existing, "Register it under another name.")
            return
    run(operations, call("create_model", arguments))


@Operations.implementation_for(ops.DropModelOp)
def drop_model(operations: Operations, operation: ops.DropModelOp) -> None:
    """Forget the model if it is there."""
    if is_offline(operations) or look(operations, MODEL, name=operation.name) is not None:
        run(operations, call("drop_model", {"name": operation.name}))


@Operations.implementation_for(ops.CreatePipelineOp)
def create_pipeline(operations: Operations, operation: ops.CreatePipelineOp) -> None:
    """Create the pipeline unless the same one is there."""
    arguments = operation.written()
    if not is_offline(operations):
        require_installed(operations)
        existing = look(operations, _PIPELINE, name=operation.name, source=operation.source)
        if existing is not None:
            existing = with_address(existing)
            names = existing["keyword_names"]
            if operation.keyword is not None and is_configuration(operation.keyword, names):
                existing["keyword"] = operation.keyword
            hint = f"SELECT embedline.drop_pipeline({literal(operation.name)}) removes it, with its vectors."
            # Without changed_by the content is no address, even if its expression is the same.
            wanted = {**arguments, "source": True, "changed_by": operation.changed_by}
            require_same(f'pipeline "{operation.name}"', wanted, existing, hint)
            return
    run(operations, call("create_pipeline", {**arguments, "source": Cast(operation.source, "regclass")}))


@Operations.implementation_for(ops.DropPipelineOp)
def drop_pipeline(operations: Operations, operation: ops.DropPipelineOp) -> None:
    """Drop the pipeline if it is there."""
    if is_offline(operations) or look(operations, _PIPELINE, name=operation.name, source=None) is not None:
        run(operations, call("drop_pipeline", {"name": operation.name}))


@Operations.implementation_for(ops.AlterPipelineOp)
def alter_pipeline(operations: Operations, operation: ops.AlterPipelineOp) -> None:
    """Change the pipeline; the same change twice changes nothing."""
    run(operations, call("alter_pipeline", operation.written()))


@Operations.implementation_for(ops.MovePipelineOp)
def move_pipeline(operations: Operations, operation: ops.MovePipelineOp) -> None:
    """Watch the new table; a second run finds the pipeline there."""
    arguments = {"name": operation.name, "new_source": Cast(operation.new_source, "regclass")}
    run(operations, call("move_pipeline", arguments))


@Operations.implementation_for(ops.AlterSourceOp)
def alter_source(operations: Operations, operation: ops.AlterSourceOp) -> None:
    """Run the statement in the migration's transaction.

    If no pipeline watches the table any more, it runs by itself.
    """
    arguments = {"source": Cast(operation.source, "regclass"), "statement": operation.statement}
    is_watched = is_offline(operations) or (
        is_installed(operations.get_bind()) and scalar(operations, _WATCHED, source=operation.source)
    )
    run(operations, call("alter_source", arguments) if is_watched else operation.statement)
