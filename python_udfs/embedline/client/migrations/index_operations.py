"""Run Alembic's operations on vector indexes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from alembic.operations import Operations
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from embedline.client import build_index
from embedline.client.migrations import operations as ops
from embedline.client.migrations.execution import (
    committed_at_once,
    is_offline,
    label,
    logger,
    look,
    no_version,
    reported,
    run,
    scalar,
    stored_version,
)
from embedline.client.migrations.statements import call, literal
from embedline.core import names
from embedline.core.sql_text import quote_ident
from embedline.errors import EmbedlineError

_POLL_SECONDS = 1.0
_COVERAGE = "SELECT to_jsonb(v) FROM embedline.versions AS v WHERE v.pipeline = :pipeline AND v.version = :version"
# The source of a pipeline without chunks, if the migration's role may read it and close its backfill.
_UNUSED = """
    SELECT p.source::oid::regclass::text FROM embedline.pipeline AS p
    WHERE p.name = :pipeline AND has_function_privilege('embedline.embed_pending(integer, text)', 'EXECUTE')
        AND has_table_privilege(p.source::oid, 'SELECT')
        AND NOT EXISTS (SELECT FROM embedline.versions AS v WHERE v.pipeline = p.name AND v.chunks > 0)
"""
# From the catalogue: a role that may not drop an index, which a superuser built for it, may not even name its schema.
_INDEX = """
    SELECT jsonb_build_object('owner', pg_catalog.pg_get_userbyid(c.relowner),
        'owned', pg_catalog.pg_has_role(c.relowner, 'USAGE'))
    FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = 'embedline_data' AND c.relname = :name
"""
_INSUFFICIENT_PRIVILEGE = "42501"


@Operations.implementation_for(ops.BuildVectorIndexOp)
def build_vector_index(operations: Operations, operation: ops.BuildVectorIndexOp) -> None:
    """Build the index in autocommit mode once the backfill is complete."""
    if is_offline(operations):
        # If it stops here, the earlier operations are committed, with Alembic's mark.
        with committed_at_once(operations, operation):
            run(operations, _index_is_there(operation))
        return
    with committed_at_once(operations, operation, required=True):
        _wait_until_complete(operations, operation)
        _build(operations, operation)


def _index_is_there(operation: ops.BuildVectorIndexOp) -> str:
    """Return a statement for a script, which stops if the index is missing.

    Only the database knows when to build it.
    """
    names = ", ".join(map(literal, (operation.pipeline, operation.version)))
    command = f"embedline build-index {operation.pipeline} --version {operation.version}"
    statement = f"embedline.index_statement({names})"
    return (
        f"-- The index of {label(operation)} cannot be built by a script: when its backfill is complete is known to the\n"
        f"-- database alone. Before this point run: {command}\n"
        f"-- or, with pg_cron: SELECT embedline.build_vector_index({names});\n"
        f"DO $embedline$\nBEGIN\n    IF {statement} IS NOT NULL THEN\n"
        f"        RAISE EXCEPTION USING MESSAGE = {literal(f'{label(operation)} has no valid index yet')},\n"
        f"            HINT = {literal(command + ', then run the rest of the script.')};\n"
        f"    END IF;\nEND\n$embedline$"
    )


def close_if_empty(operations: Operations, operation: Any) -> None:
    """Close the backfill of an empty table.

    A database that is built from its history has such tables, and no worker has to run for them.
    """
    if _coverage(operations, operation)["state"] == "complete":
        return
    source = scalar(operations, _UNUSED, pipeline=operation.pipeline)
    if source is not None and scalar(operations, f"SELECT NOT EXISTS (SELECT FROM {source})"):
        run(operations, call("embed_pending", {"max_rows": 1, "pipeline_name": operation.pipeline}))


def _wait_until_complete(operations: Operations, operation: ops.BuildVectorIndexOp) -> None:
    close_if_empty(operations, operation)
    limit = time.monotonic() + operation.wait_seconds
    reported = None
    while (coverage := _coverage(operations, operation))["state"] != "complete":
        progress = _progress(coverage)
        if time.monotonic() >= limit:
            raise CommandError(
                f"{label(operation)} is not filled yet: {progress}. HINT: Let the workers go on, look at embedline.versions, "
                "and run alembic upgrade again; wait_seconds= lets the revision wait for it."
            )
        if progress != reported:
            logger.info("%s: %s", label(operation), progress)
            reported = progress
        time.sleep(_POLL_SECONDS)


def _coverage(operations: Operations, operation: Any) -> dict[str, Any]:
    found = look(operations, _COVERAGE, pipeline=operation.pipeline, version=operation.version)
    if found is None:
        raise no_version(operation)
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
    """Build as `embedline build-index` does, over the migration's own connection.

    That is in autocommit mode.
    """
    client = build_index.SqlAlchemyClient(operations.get_bind())
    logger.info("building the index of %s", label(operation))
    try:
        with reported():
            listener = build_index.Listener(tell=logger.warning)
            build_index.build(client, operation.pipeline, operation.version, listener=listener)
    except EmbedlineError as error:
        raise CommandError(" HINT: ".join(filter(None, (error.message, error.hint)))) from error
    except CommandError as error:
        if not isinstance(error.__cause__, DBAPIError) or client.sqlstate(error.__cause__) != _INSUFFICIENT_PRIVILEGE:
            raise
        command = f"embedline build-index {operation.pipeline} --version {operation.version}"
        raise CommandError(f"{error} HINT: {command} as a superuser, then alembic upgrade again.") from error


def _bare_index_name(operation: Any) -> str:
    return names.vector_index(operation.pipeline, operation.version)


def _index_name(operation: Any) -> str:
    return f"embedline_data.{quote_ident(_bare_index_name(operation))}"


@Operations.implementation_for(ops.DropVectorIndexOp)
def drop_vector_index(operations: Operations, operation: ops.DropVectorIndexOp) -> None:
    """Drop the index without blocking reads or writes."""
    with committed_at_once(operations, operation, required=True):
        if not is_offline(operations):
            version = stored_version(operations, operation)
            if version is not None and version["serving"]:
                raise CommandError(
                    f"{label(operation)} serves: without its index each search reads all of it. "
                    f"HINT: SELECT embedline.rollback({literal(operation.pipeline)}) first."
                )
            index = look(operations, _INDEX, name=_bare_index_name(operation))
            if index is None:
                return
            if not index["owned"]:
                logger.info("the index of %s stays: it is %s's, and goes with it", label(operation), index["owner"])
                return
        run(operations, f"DROP INDEX CONCURRENTLY IF EXISTS {_index_name(operation)}")
