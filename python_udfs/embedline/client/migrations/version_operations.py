"""Run Alembic's operations on versions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import sqlalchemy
from alembic.operations import Operations
from alembic.util import CommandError

from embedline.client.migrations import operations as ops
from embedline.client.migrations.execution import (
    MODEL,
    committed_at_once,
    is_offline,
    label,
    logger,
    look,
    names,
    no_version,
    reported,
    require_same,
    run,
    scalar,
    stored_version,
)
from embedline.client.migrations.index_operations import close_if_empty
from embedline.client.migrations.statements import Cast, call, call_rows, literal

_NEXT_NUMBER = """
    SELECT max(v.number) + 1 FROM embedline.version AS v JOIN embedline.pipeline AS p USING (pipeline_id) WHERE p.name = :pipeline
"""
_GATE = "SELECT v.gate FROM embedline.versions AS v WHERE v.pipeline = :pipeline AND v.version = :version"

_IS_EMPTY = "SELECT v.chunks = 0 FROM embedline.versions AS v WHERE v.pipeline = :pipeline AND v.version = :version"


@Operations.implementation_for(ops.AddEmbeddingVersionOp)
def add_embedding_version(operations: Operations, operation: ops.AddEmbeddingVersionOp) -> None:
    """Begin the version, and check that it got the number of the revision files.

    It is begun in the migration's transaction.
    """
    arguments = operation.written()
    del arguments["version"]
    arguments["pipeline_name"] = arguments.pop("pipeline")
    statement = call("add_embedding_version", arguments)
    if is_offline(operations):
        # Committed before the index operation, which stops the script until there are vectors to index.
        with committed_at_once(operations, operation):
            run(operations, _checked_number(statement, operation))
        return
    existing = stored_version(operations, operation)
    if existing is not None:
        recipe = {name: value for name, value in operation.written().items() if name not in ("pipeline", "version")}
        hint = (
            f"SELECT embedline.drop_embedding_version({literal(operation.pipeline)}, {operation.version}) removes it"
            " if it is not needed."
        )
        require_same(label(operation), recipe, existing, hint, ("backfill_order", "backfill_rate"))
        return
    # Committed at once, because until then a DELETE on the source waits for the chunk table, which the new table
    # references.
    with committed_at_once(operations, operation):
        # Checked before, too, because a version of another number would stay.
        _require_number(operation, scalar(operations, _NEXT_NUMBER, pipeline=operation.pipeline))
        _require_number(operation, run(operations, statement))


def _require_number(operation: ops.AddEmbeddingVersionOp, number: int | None) -> None:
    if number is not None and number != operation.version:
        raise CommandError(
            f'the next version of pipeline "{operation.pipeline}" is {number}, the revision says {operation.version}. '
            f"HINT: Write version={number} in this revision and in those that follow from it."
        )


def _checked_number(statement: str, operation: ops.AddEmbeddingVersionOp) -> str:
    """Return a statement that raises if the version gets an unexpected number.

    The rest of the script names the expected one.
    """
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
    if not is_offline(operations) and stored_version(operations, operation) is None:
        return
    window = None if operation.rollback_window is None else Cast(operation.rollback_window, "interval")
    statement = call("drop_embedding_version", {**names(operation), "rollback_window": window})
    if is_offline(operations):
        run(operations, statement)
        return
    # Committed at once, because until then reads and writes wait for the dropped tables.
    with committed_at_once(operations, operation):
        run(operations, statement)


@Operations.implementation_for(ops.RestoreEmbeddingVersionOp)
def restore_embedding_version(operations: Operations, operation: ops.RestoreEmbeddingVersionOp) -> None:
    """Pass if the version was never dropped; otherwise name the way to its model."""
    if not is_offline(operations) and stored_version(operations, operation) is not None:
        return
    model = operation.model or "MODEL"
    raise CommandError(
        f"{label(operation)} was dropped, and its vectors do not come back by a downgrade. "
        f"HINT: {_registration(operations, operation)}"
        f"embedline upgrade-model {operation.pipeline} --model {model} writes a chain to a new version of that model; "
        "alembic stamp with the revision before this one moves only Alembic's mark."
    )


def _registration(operations: Operations, operation: ops.RestoreEmbeddingVersionOp) -> str:
    """Return the statement that registers a forgotten model of the version again."""
    name = operation.model
    if name is None or (not is_offline(operations) and look(operations, MODEL, name=name) is not None):
        return ""
    if operation.registration is None:
        return f"Register the model again, as it was, with embedline.create_model({literal(name)}, ...). Then: "
    statement = call("create_model", {"name": name, **operation.registration})
    return f"The model is forgotten: as a superuser, {statement}; Then: "


@Operations.implementation_for(ops.CutoverEmbeddingVersionOp)
def cutover_embedding_version(operations: Operations, operation: ops.CutoverEmbeddingVersionOp) -> None:
    """Run the gate if no passing one is stored, then swap; each commits at once."""
    statement = call("cutover", {**names(operation), "override_reason": operation.override_reason})
    with committed_at_once(operations, operation):
        if is_offline(operations):
            if operation.evaluate and operation.override_reason is None:
                run(operations, _evaluation(operation))
            run(operations, statement)
            return
        version = stored_version(operations, operation)
        if version is None:
            raise no_version(operation)
        if version["serving"]:
            logger.info("%s serves already", label(operation))
            return
        close_if_empty(operations, operation)
        if operation.evaluate and operation.override_reason is None:
            _pass_gate(operations, operation)
        run(operations, statement)


def _evaluation(operation: ops.CutoverEmbeddingVersionOp | ops.UseModeOp) -> str:
    canaries = None if operation.canaries is None else Cast(operation.canaries, "regclass")
    settings = {name: getattr(operation, name, None) for name in ("k", "margin", "query_count", "mode")}
    return call_rows("evaluate", {**names(operation), "canaries": canaries, **settings})


def _pass_gate(operations: Operations, operation: ops.CutoverEmbeddingVersionOp) -> None:
    """Evaluate if the newest gate does not pass.

    The result is stored, and embedline.cutover decides by it.
    """
    if scalar(operations, _GATE, pipeline=operation.pipeline, version=operation.version) != "pass":
        _measure(operations, operation)


def _measure(operations: Operations, operation: ops.CutoverEmbeddingVersionOp | ops.UseModeOp) -> None:
    """Evaluate, and log what was measured."""
    with reported(), _notices_logged(operations):
        rows = operations.get_bind().exec_driver_sql(_evaluation(operation), execution_options={"no_parameters": True})
        for row in rows.mappings():
            logger.info("gate of %s: %s", label(operation), _gate_line(row))


def _gate_line(row: sqlalchemy.RowMapping) -> str:
    """Return a row of a gate in words.

    It has the measure, the verdict, the figures and the detail.
    """
    figures = [f"{name} {row[name]:.3f}" for name in ("old", "new", "difference") if row[name] is not None]
    if row["low"] is not None:
        figures.append(f"95 % interval {row['low']:.3f} to {row['high']:.3f}")
    parts = [row["verdict"], ", ".join(figures), row["detail"]]
    return f"{row['measure']}: {'; '.join(part for part in parts if part)}"


@contextlib.contextmanager
def _notices_logged(operations: Operations) -> Iterator[None]:
    """Log the server's notices while the block runs, such as a gate's progress.

    Drivers other than psycopg 3 keep them.
    """
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
    """Roll back if the version serves, so that a second run does not roll forward."""
    with committed_at_once(operations, operation):
        version = None if is_offline(operations) else stored_version(operations, operation)
        if is_offline(operations) or (version is not None and version["serving"]):
            run(operations, call("rollback", {"pipeline_name": operation.pipeline}))


@Operations.implementation_for(ops.UseModeOp)
def use_mode(operations: Operations, operation: ops.UseModeOp) -> None:
    """Evaluate the mode if there are canaries, then use it.

    Each commits at once, so the evidence stays.
    """
    arguments = {**names(operation), "mode": operation.mode}
    statement = call("use_mode", {**arguments, "override_reason": operation.override_reason})
    is_measured = operation.canaries is not None and operation.override_reason is None and operation.mode != "vector"
    with committed_at_once(operations, operation):
        if is_offline(operations):
            if is_measured:
                run(operations, _evaluation(operation))
            run(operations, statement)
            return
        version = stored_version(operations, operation)
        if version is None:
            raise no_version(operation)
        if version["search_mode"] == operation.mode:
            logger.info("%s is searched by mode %s already", label(operation), operation.mode)
            return
        if operation.mode != "vector" and scalar(
            operations, _IS_EMPTY, pipeline=operation.pipeline, version=operation.version
        ):
            # A database that is built from its history has no rows to measure.
            reason = operation.override_reason or "set by a migration before there were rows"
            statement = call("use_mode", {**arguments, "override_reason": reason})
        elif is_measured:
            _measure(operations, operation)
        run(operations, statement)
