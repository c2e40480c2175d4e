"""What each operation does: online it looks first, so that a chain that was killed can be run again; offline it renders.

Alembic writes its version table in the transaction of the migration. Operations that stay in it (models, pipelines) are all or
nothing with that; those on versions commit on their own, so that no lock outlives its statement, and find on the next run
that they are done.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy
from alembic.operations import Operations
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from embedline.client import build_index
from embedline.client.migrations import operations as ops
from embedline.client.migrations.catalogue import is_installed
from embedline.client.migrations.statements import Cast, call, call_rows, literal
from embedline.core.sql_text import quote_ident
from embedline.errors import EmbedlineError

# A child of Alembic's own logger, so that an environment as `alembic init` makes it shows what is done.
logger = logging.getLogger("alembic.embedline")

_POLL_SECONDS = 1.0

_MODEL = "SELECT to_jsonb(m) FROM embedline.model AS m WHERE m.name = :name"
_PIPELINE = """
    SELECT to_jsonb(p) || jsonb_build_object('source', p.source::oid = to_regclass(:source), 'model', m.name,
        'content', p.content_expression, 'filter', p.filter_expression, 'tenant', p.tenant_expression,
        'document_prefix', p.document_prefix_expression, 'column_type', v.column_type, 'distance', v.distance,
        'index_method', v.index_method, 'index_options', v.index_options, 'chunking', s.chunking,
        'chunk_tokens', s.chunk_tokens, 'chunk_overlap', s.chunk_overlap, 'chunking_options', s.chunking_options)
    FROM embedline.pipeline AS p JOIN embedline.version AS v ON v.version_id = p.serving_version_id
    JOIN embedline.model AS m USING (model_id)
    JOIN embedline.chunk_set AS s ON s.pipeline_id = p.pipeline_id AND s.number = v.chunk_set
    WHERE p.name = :name
"""
_WATCHED = "SELECT EXISTS (SELECT FROM embedline.pipeline AS p WHERE p.source::oid = to_regclass(:source))"
_VERSION = """
    SELECT jsonb_build_object('model', m.name, 'column_type', v.column_type, 'distance', v.distance,
        'index_method', v.index_method, 'index_options', v.index_options, 'chunking', s.chunking,
        'chunk_tokens', s.chunk_tokens, 'chunk_overlap', s.chunk_overlap, 'chunking_options', s.chunking_options,
        'serving', v.version_id = p.serving_version_id, 'state', v.state)
    FROM embedline.version AS v JOIN embedline.pipeline AS p USING (pipeline_id) JOIN embedline.model AS m USING (model_id)
    JOIN embedline.chunk_set AS s ON s.pipeline_id = p.pipeline_id AND s.number = v.chunk_set
    WHERE p.name = :pipeline AND v.number = :version
"""
_NEXT_NUMBER = """
    SELECT max(v.number) + 1 FROM embedline.version AS v JOIN embedline.pipeline AS p USING (pipeline_id) WHERE p.name = :pipeline
"""
_COVERAGE = "SELECT to_jsonb(v) FROM embedline.versions AS v WHERE v.pipeline = :pipeline AND v.version = :version"
_GATE = "SELECT v.gate FROM embedline.versions AS v WHERE v.pipeline = :pipeline AND v.version = :version"
# The source of a pipeline without chunks that the migration's role may read and whose backfill it may close.
_UNUSED = """
    SELECT p.source::oid::regclass::text FROM embedline.pipeline AS p
    WHERE p.name = :pipeline AND has_function_privilege('embedline.embed_pending(integer, text)', 'EXECUTE')
        AND has_table_privilege(p.source::oid, 'SELECT')
        AND NOT EXISTS (SELECT FROM embedline.versions AS v WHERE v.pipeline = p.name AND v.chunks > 0)
"""
# In the catalogue: whoever may not drop the index, which a superuser built for it, may not even name its schema.
_INDEX = """
    SELECT jsonb_build_object('owner', pg_catalog.pg_get_userbyid(c.relowner),
        'owned', pg_catalog.pg_has_role(c.relowner, 'USAGE'))
    FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = 'embedline_data' AND c.relname = :name
"""
_INSUFFICIENT_PRIVILEGE = "42501"
# Set by ALTER or learnt by the model itself; a declaration that is otherwise the same is the same model.
_NOT_COMPARED = ("price_per_million_tokens", "expression_search_path", "capture", "version")


@Operations.implementation_for(ops.CreateModelOp)
def create_model(operations: Operations, operation: ops.CreateModelOp) -> None:
    """Register the model unless the same one is there."""
    arguments = operation.written()
    if not _is_offline(operations):
        _require_installed(operations)
        existing = _look(operations, _MODEL, name=operation.name)
        if existing is not None:
            _require_same(f'model "{operation.name}"', arguments, existing, "Register it under another name.")
            return
    _run(operations, call("create_model", arguments))


@Operations.implementation_for(ops.DropModelOp)
def drop_model(operations: Operations, operation: ops.DropModelOp) -> None:
    """Forget the model if it is there."""
    if _is_offline(operations) or _look(operations, _MODEL, name=operation.name) is not None:
        _run(operations, call("drop_model", {"name": operation.name}))


@Operations.implementation_for(ops.CreatePipelineOp)
def create_pipeline(operations: Operations, operation: ops.CreatePipelineOp) -> None:
    """Create the pipeline unless the same one is there."""
    arguments = operation.written()
    if not _is_offline(operations):
        _require_installed(operations)
        existing = _look(operations, _PIPELINE, name=operation.name, source=operation.source)
        if existing is not None:
            hint = f"SELECT embedline.drop_pipeline({literal(operation.name)}) removes it, with its vectors."
            _require_same(f'pipeline "{operation.name}"', {**arguments, "source": True}, existing, hint)
            return
    _run(operations, call("create_pipeline", {**arguments, "source": Cast(operation.source, "regclass")}))


@Operations.implementation_for(ops.DropPipelineOp)
def drop_pipeline(operations: Operations, operation: ops.DropPipelineOp) -> None:
    """Drop the pipeline if it is there."""
    if _is_offline(operations) or _look(operations, _PIPELINE, name=operation.name, source=None) is not None:
        _run(operations, call("drop_pipeline", {"name": operation.name}))


@Operations.implementation_for(ops.AlterPipelineOp)
def alter_pipeline(operations: Operations, operation: ops.AlterPipelineOp) -> None:
    """Change the pipeline; the same change twice changes nothing."""
    _run(operations, call("alter_pipeline", operation.written()))


@Operations.implementation_for(ops.MovePipelineOp)
def move_pipeline(operations: Operations, operation: ops.MovePipelineOp) -> None:
    """Go over to the table; a second run finds the pipeline there."""
    arguments = {"name": operation.name, "new_source": Cast(operation.new_source, "regclass")}
    _run(operations, call("move_pipeline", arguments))


@Operations.implementation_for(ops.AlterSourceOp)
def alter_source(operations: Operations, operation: ops.AlterSourceOp) -> None:
    """Run the statement in the migration's transaction, or by itself where no pipeline watches the table any more."""
    arguments = {"source": Cast(operation.source, "regclass"), "statement": operation.statement}
    is_watched = _is_offline(operations) or (
        is_installed(operations.get_bind()) and _scalar(operations, _WATCHED, source=operation.source)
    )
    _run(operations, call("alter_source", arguments) if is_watched else operation.statement)


@Operations.implementation_for(ops.AddEmbeddingVersionOp)
def add_embedding_version(operations: Operations, operation: ops.AddEmbeddingVersionOp) -> None:
    """Begin the version in the migration's transaction, and see that it got the number that the revision files name."""
    arguments = operation.written()
    del arguments["version"]
    arguments["pipeline_name"] = arguments.pop("pipeline")
    statement = call("add_embedding_version", arguments)
    if _is_offline(operations):
        # Committed before the script comes to the index, which stops it until there is something to index.
        with _committed_at_once(operations, operation):
            _run(operations, _checked_number(statement, operation))
        return
    existing = _version(operations, operation)
    if existing is not None:
        recipe = {name: value for name, value in operation.written().items() if name not in ("pipeline", "version")}
        hint = (
            f"SELECT embedline.drop_embedding_version({literal(operation.pipeline)}, {operation.version}) removes it"
            " where nobody needs it."
        )
        _require_same(_label(operation), recipe, existing, hint, ("backfill_order", "backfill_rate"))
        return
    # Committed at once: until then a DELETE on the source waits for the chunk table, to which the new one has a foreign key.
    with _committed_at_once(operations, operation):
        # Looked at before, too: a version of another number would stay.
        _require_number(operation, _scalar(operations, _NEXT_NUMBER, pipeline=operation.pipeline))
        _require_number(operation, _run(operations, statement))


def _require_number(operation: ops.AddEmbeddingVersionOp, number: int | None) -> None:
    if number is not None and number != operation.version:
        raise CommandError(
            f'the next version of pipeline "{operation.pipeline}" is {number}, the revision says {operation.version}. '
            f"HINT: Write version={number} in this revision and in those that follow from it."
        )


def _checked_number(statement: str, operation: ops.AddEmbeddingVersionOp) -> str:
    """Return the statement that raises where the version gets another number than the rest of the script names."""
    number = statement.removeprefix("SELECT ")
    message = f"the next version of pipeline {operation.pipeline} is not {operation.version}"
    return (
        f"DO {_dollar(number)}\nBEGIN\n    IF {number} <> {operation.version} THEN\n"
        f"        RAISE EXCEPTION USING MESSAGE = {literal(message)};\n    END IF;\nEND\n{_dollar(number)}"
    )


def _dollar(text: str) -> str:
    """Return a dollar quote that the text does not hold."""
    tag = "embedline"
    while f"${tag}$" in text:
        tag += "_"
    return f"${tag}$"


@Operations.implementation_for(ops.DropEmbeddingVersionOp)
def drop_embedding_version(operations: Operations, operation: ops.DropEmbeddingVersionOp) -> None:
    """Drop the version if it is there."""
    if not _is_offline(operations) and _version(operations, operation) is None:
        return
    window = None if operation.rollback_window is None else Cast(operation.rollback_window, "interval")
    statement = call("drop_embedding_version", {**_names(operation), "rollback_window": window})
    if _is_offline(operations):
        _run(operations, statement)
        return
    # Committed at once: until then reads and writes wait for what is dropped.
    with _committed_at_once(operations, operation):
        _run(operations, statement)


@Operations.implementation_for(ops.RestoreEmbeddingVersionOp)
def restore_embedding_version(operations: Operations, operation: ops.RestoreEmbeddingVersionOp) -> None:
    """Pass where the version was never dropped; otherwise say how to get to its model."""
    if not _is_offline(operations) and _version(operations, operation) is not None:
        return
    model = operation.model or "MODEL"
    raise CommandError(
        f"{_label(operation)} was dropped, and its vectors do not come back by a downgrade. "
        f"HINT: {_registration(operations, operation)}"
        f"embedline upgrade-model {operation.pipeline} --model {model} writes a chain to a new version of that model; "
        "alembic stamp with the revision before this one moves only Alembic's mark."
    )


def _registration(operations: Operations, operation: ops.RestoreEmbeddingVersionOp) -> str:
    """Return what registers the version's model again, where the contract has forgotten it."""
    name = operation.model
    if name is None or (not _is_offline(operations) and _look(operations, _MODEL, name=name) is not None):
        return ""
    if operation.registration is None:
        return f"Register the model again, as it was, with embedline.create_model({literal(name)}, ...). Then: "
    statement = call("create_model", {"name": name, **operation.registration})
    return f"The model is forgotten: as a superuser, {statement}; Then: "


@Operations.implementation_for(ops.BuildVectorIndexOp)
def build_vector_index(operations: Operations, operation: ops.BuildVectorIndexOp) -> None:
    """Build the index over a connection in autocommit mode once the backfill is complete."""
    if _is_offline(operations):
        # Where it stops, what came before it is committed, with Alembic's mark.
        with _committed_at_once(operations, operation):
            _run(operations, _index_is_there(operation))
        return
    with _committed_at_once(operations, operation, required=True):
        _wait_until_complete(operations, operation)
        _build(operations, operation)


def _index_is_there(operation: ops.BuildVectorIndexOp) -> str:
    """Return what a script can do: stop where the index is missing, since only the database knows when to build it."""
    names = ", ".join(map(literal, (operation.pipeline, operation.version)))
    command = f"embedline build-index {operation.pipeline} --version {operation.version}"
    statement = f"embedline.index_statement({names})"
    return (
        f"-- The index of {_label(operation)} cannot be built by a script: when its backfill is complete is known to the\n"
        f"-- database alone. Before this point run: {command}\n"
        f"-- or, with pg_cron: SELECT embedline.build_vector_index({names});\n"
        f"DO $embedline$\nBEGIN\n    IF {statement} IS NOT NULL THEN\n"
        f"        RAISE EXCEPTION USING MESSAGE = {literal(f'{_label(operation)} has no valid index yet')},\n"
        f"            HINT = {literal(command + ', then run the rest of the script.')};\n"
        f"    END IF;\nEND\n$embedline$"
    )


def _close_if_empty(operations: Operations, operation: Any) -> None:
    """Close the backfill of an empty table, as in a database that is built from its history: no worker has to run for it."""
    if _coverage(operations, operation)["state"] == "complete":
        return
    source = _scalar(operations, _UNUSED, pipeline=operation.pipeline)
    if source is not None and _scalar(operations, f"SELECT NOT EXISTS (SELECT FROM {source})"):
        _run(operations, call("embed_pending", {"max_rows": 1, "pipeline_name": operation.pipeline}))


def _wait_until_complete(operations: Operations, operation: ops.BuildVectorIndexOp) -> None:
    _close_if_empty(operations, operation)
    limit = time.monotonic() + operation.wait_seconds
    reported = None
    while (coverage := _coverage(operations, operation))["state"] != "complete":
        progress = _progress(coverage)
        if time.monotonic() >= limit:
            raise CommandError(
                f"{_label(operation)} is not filled yet: {progress}. HINT: Let the workers go on, look at embedline.versions, "
                "and run alembic upgrade again; wait_seconds= lets the revision wait for it."
            )
        if progress != reported:
            logger.info("%s: %s", _label(operation), progress)
            reported = progress
        time.sleep(_POLL_SECONDS)


def _coverage(operations: Operations, operation: Any) -> dict[str, Any]:
    found = _look(operations, _COVERAGE, pipeline=operation.pipeline, version=operation.version)
    if found is None:
        raise _no_version(operation)
    return found


def _progress(coverage: Mapping[str, Any]) -> str:
    # A version that is chunked in another way than the serving one begins without chunks.
    parts = ["no row is chunked yet"]
    if coverage["chunks"]:
        parts = [f"{coverage['vectors']} of {coverage['chunks']} chunks have a vector"]
    refused = (coverage["dead_letters"] or 0) - (coverage["accepted"] or 0)
    if refused > 0:
        parts.append(f"{refused} dead letters are not accepted (embedline.accept_dead_letters)")
    if coverage["last_error"]:
        parts.append(f"last error: {coverage['last_error']}")
    return "; ".join(parts)


def _build(operations: Operations, operation: ops.BuildVectorIndexOp) -> None:
    """Build as `embedline build-index` does, over the migration's own connection, which is in autocommit mode."""
    client = build_index.SqlAlchemyClient(operations.get_bind())
    logger.info("building the index of %s", _label(operation))
    try:
        with _reported():
            build_index.build(client, operation.pipeline, operation.version, tell=logger.warning)
    except EmbedlineError as error:
        raise CommandError(" HINT: ".join(filter(None, (error.message, error.hint)))) from error
    except CommandError as error:
        if not isinstance(error.__cause__, DBAPIError) or client.sqlstate(error.__cause__) != _INSUFFICIENT_PRIVILEGE:
            raise
        command = f"embedline build-index {operation.pipeline} --version {operation.version}"
        raise CommandError(f"{error} HINT: {command} as a superuser, then alembic upgrade again.") from error


def _bare_index_name(operation: Any) -> str:
    return f"{operation.pipeline}_v{operation.version}_embedding_idx"


def _index_name(operation: Any) -> str:
    return f"embedline_data.{quote_ident(_bare_index_name(operation))}"


@Operations.implementation_for(ops.DropVectorIndexOp)
def drop_vector_index(operations: Operations, operation: ops.DropVectorIndexOp) -> None:
    """Drop the index without holding up reads or writes."""
    with _committed_at_once(operations, operation, required=True):
        if not _is_offline(operations):
            version = _version(operations, operation)
            if version is not None and version["serving"]:
                raise CommandError(
                    f"{_label(operation)} serves: without its index each search reads all of it. "
                    f"HINT: SELECT embedline.rollback({literal(operation.pipeline)}) first."
                )
            index = _look(operations, _INDEX, name=_bare_index_name(operation))
            if index is None:
                return
            if not index["owned"]:
                logger.info("the index of %s stays: it is %s's, and goes with it", _label(operation), index["owner"])
                return
        _run(operations, f"DROP INDEX CONCURRENTLY IF EXISTS {_index_name(operation)}")


@Operations.implementation_for(ops.CutoverEmbeddingVersionOp)
def cutover_embedding_version(operations: Operations, operation: ops.CutoverEmbeddingVersionOp) -> None:
    """Run the gate where no passing one is stored, then swap; each commits at once."""
    statement = call("cutover", {**_names(operation), "override_reason": operation.override_reason})
    with _committed_at_once(operations, operation):
        if _is_offline(operations):
            if operation.evaluate and operation.override_reason is None:
                _run(operations, _evaluation(operation))
            _run(operations, statement)
            return
        version = _version(operations, operation)
        if version is None:
            raise _no_version(operation)
        if version["serving"]:
            logger.info("%s serves already", _label(operation))
            return
        _close_if_empty(operations, operation)
        if operation.evaluate and operation.override_reason is None:
            _pass_gate(operations, operation)
        _run(operations, statement)


def _evaluation(operation: ops.CutoverEmbeddingVersionOp) -> str:
    canaries = None if operation.canaries is None else Cast(operation.canaries, "regclass")
    settings = {"k": operation.k, "margin": operation.margin, "query_count": operation.query_count}
    return call_rows("evaluate", {**_names(operation), "canaries": canaries, **settings})


def _pass_gate(operations: Operations, operation: ops.CutoverEmbeddingVersionOp) -> None:
    """Evaluate where the newest gate does not pass; what it finds is stored, and embedline.cutover decides by that."""
    if _scalar(operations, _GATE, pipeline=operation.pipeline, version=operation.version) == "pass":
        return
    with _reported(), _notices_logged(operations):
        rows = operations.get_bind().exec_driver_sql(_evaluation(operation), execution_options={"no_parameters": True})
        for row in rows.mappings():
            logger.info("gate of %s: %s", _label(operation), _gate_line(row))


def _gate_line(row: sqlalchemy.RowMapping) -> str:
    """Return a row of a gate in words: what was measured, the verdict, the figures that it has, and the detail."""
    figures = [f"{name} {row[name]:.3f}" for name in ("old", "new", "difference") if row[name] is not None]
    if row["low"] is not None:
        figures.append(f"95 % interval {row['low']:.3f} to {row['high']:.3f}")
    parts = [row["verdict"], ", ".join(figures), row["detail"]]
    return f"{row['measure']}: {'; '.join(part for part in parts if part)}"


@contextlib.contextmanager
def _notices_logged(operations: Operations) -> Iterator[None]:
    """Log what the server says while the block runs, such as how far a gate is; drivers other than psycopg 3 keep it."""
    driver: Any = operations.get_bind().connection.driver_connection
    if not hasattr(driver, "add_notice_handler"):
        yield
        return

    def hear(notice: Any) -> None:
        logger.info("%s", notice.message_primary)

    driver.add_notice_handler(hear)
    try:
        yield
    finally:
        driver.remove_notice_handler(hear)


@Operations.implementation_for(ops.RollbackEmbeddingVersionOp)
def rollback_embedding_version(operations: Operations, operation: ops.RollbackEmbeddingVersionOp) -> None:
    """Roll back if the version serves: a second run must not roll forward again."""
    with _committed_at_once(operations, operation):
        version = None if _is_offline(operations) else _version(operations, operation)
        if _is_offline(operations) or (version is not None and version["serving"]):
            _run(operations, call("rollback", {"pipeline_name": operation.pipeline}))


@contextlib.contextmanager
def _committed_at_once(
    operations: Operations, operation: ops.PipelineOperation, *, required: bool = False
) -> Iterator[None]:
    """Leave the migration's transaction for the block: locks end with each statement, and what is done stays done.

    An environment that begins the transaction itself, outside Alembic, cannot be left: then the block is part of it,
    unless it is `required` to be outside.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(operations.get_context().autocommit_block())
        except (AssertionError, AttributeError):
            if required:
                raise CommandError(
                    f"op.{operation.operation} cannot run here: env.py has begun a transaction of its own, and CONCURRENTLY "
                    "runs in none. HINT: Let context.begin_transaction() begin it, or run embedline build-index first."
                ) from None
            logger.warning("op.%s holds its locks until the transaction that env.py began is over", operation.operation)
        yield


def _is_offline(operations: Operations) -> bool:
    return bool(operations.get_context().as_sql)


def _names(operation: Any) -> dict[str, Any]:
    return {"pipeline_name": operation.pipeline, "version_number": operation.version}


def _label(operation: Any) -> str:
    return f'version {operation.version} of pipeline "{operation.pipeline}"'


def _no_version(operation: Any) -> CommandError:
    return CommandError(
        f"there is no {_label(operation)}. HINT: SELECT version, model FROM embedline.versions WHERE pipeline = "
        f"{literal(operation.pipeline)} lists them; op.add_embedding_version begins one."
    )


def _version(operations: Operations, operation: Any) -> dict[str, Any] | None:
    return _look(operations, _VERSION, pipeline=operation.pipeline, version=operation.version)


def _require_installed(operations: Operations) -> None:
    if not is_installed(operations.get_bind()):
        raise CommandError(
            "embedline is not installed in this database, or is older than these operations. "
            "HINT: EMBEDLINE_DSN=postgresql://... embedline upgrade, as a superuser."
        )


def _require_same(
    label: str, wanted: Mapping[str, Any], existing: Mapping[str, Any], hint: str, ignored: tuple[str, ...] = ()
) -> None:
    """Raise where what exists under the name is not what the revision asks for; what it leaves open may be anything."""
    for name, value in wanted.items():
        if name in _NOT_COMPARED or name in ignored or name not in existing:
            continue
        found = existing[name]
        if found != (dict(value) if isinstance(value, Mapping) else value):
            was = "another table" if name == "source" else repr(found)
            raise CommandError(f"{label} exists already with another {name}: {was}. HINT: {hint}")


def _look(operations: Operations, query: str, **parameters: Any) -> dict[str, Any] | None:
    """Return the row that a query gives as one jsonb, or None."""
    found = _scalar(operations, query, **parameters)
    # Whether jsonb comes parsed is up to the driver.
    row: dict[str, Any] | None = json.loads(found) if isinstance(found, str) else found
    return row


def _scalar(operations: Operations, query: str, **parameters: Any) -> Any:
    with _reported():
        return operations.get_bind().execute(sqlalchemy.text(query), parameters).scalar()


def _run(operations: Operations, statement: str) -> Any:
    """Run the statement and return its value, or write it to the script."""
    context = operations.get_context()
    if context.as_sql:
        context.impl.static_output(statement + ";")
        return None
    with _reported():
        # Plain execution would take ":name" and "%" in a content expression for parameters.
        result = operations.get_bind().exec_driver_sql(statement, execution_options={"no_parameters": True})
        return result.scalar() if result.returns_rows else None


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Turn the database's refusal into what `alembic` prints without a traceback, with its hint."""
    try:
        yield
    except DBAPIError as error:
        if getattr(error.orig, "diag", None) is None:
            raise
        raise _command_error(error.orig) from error


def _command_error(error: Any) -> CommandError:
    parts = [str(error.diag.message_primary or error).removeprefix("embedline: ")]
    if error.diag.message_detail:
        parts.append(f"DETAIL: {error.diag.message_detail}")
    if error.diag.message_hint:
        parts.append(f"HINT: {error.diag.message_hint}")
    return CommandError(" ".join(parts))
