"""Run a statement of an operation, online or as SQL text.

Its errors are reported in Alembic's form.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy
from alembic.operations import Operations
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from embedline.client.migrations import operations as ops
from embedline.client.migrations.catalogue import is_installed
from embedline.client.migrations.statements import literal

# A child of Alembic's own logger, so that an environment made by `alembic init` shows its messages.
logger = logging.getLogger("alembic.embedline")
MODEL = "SELECT to_jsonb(m) FROM embedline.model AS m WHERE m.name = :name"
_VERSION = """
    SELECT jsonb_build_object('model', m.name, 'column_type', v.column_type, 'distance', v.distance,
        'index_method', v.index_method, 'index_options', v.index_options, 'chunking', s.chunking,
        'chunk_tokens', s.chunk_tokens, 'chunk_overlap', s.chunk_overlap, 'chunking_options', s.chunking_options,
        'serving', v.version_id = p.serving_version_id, 'state', v.state, 'search_mode', v.search_mode)
    FROM embedline.version AS v JOIN embedline.pipeline AS p USING (pipeline_id) JOIN embedline.model AS m USING (model_id)
    JOIN embedline.chunk_set AS s ON s.pipeline_id = p.pipeline_id AND s.number = v.chunk_set
    WHERE p.name = :pipeline AND v.number = :version
"""
# Set by ALTER or learnt by the model itself. A declaration that is otherwise the same is the same model.
_NOT_COMPARED = ("price_per_million_tokens", "expression_search_path", "capture", "version")


@contextlib.contextmanager
def committed_at_once(
    operations: Operations, operation: ops.PipelineOperation, *, required: bool = False
) -> Iterator[None]:
    """Leave the migration's transaction for the block.

    Locks end with each statement, and each statement commits. An environment that begins the transaction itself,
    outside Alembic, cannot be left. Then the block is part of it, unless it is `required` to be outside.
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


def is_offline(operations: Operations) -> bool:
    return bool(operations.get_context().as_sql)


def names(operation: Any) -> dict[str, Any]:
    return {"pipeline_name": operation.pipeline, "version_number": operation.version}


def label(operation: Any) -> str:
    return f'version {operation.version} of pipeline "{operation.pipeline}"'


def no_version(operation: Any) -> CommandError:
    return CommandError(
        f"there is no {label(operation)}. HINT: SELECT version, model FROM embedline.versions WHERE pipeline = "
        f"{literal(operation.pipeline)} lists them; op.add_embedding_version begins one."
    )


def stored_version(operations: Operations, operation: Any) -> dict[str, Any] | None:
    return look(operations, _VERSION, pipeline=operation.pipeline, version=operation.version)


def require_installed(operations: Operations) -> None:
    if not is_installed(operations.get_bind()):
        raise CommandError(
            "embedline is not installed in this database, or is older than these operations. "
            "HINT: EMBEDLINE_DSN=postgresql://... embedline upgrade, as a superuser."
        )


def require_same(
    label: str, wanted: Mapping[str, Any], existing: Mapping[str, Any], hint: str, ignored: tuple[str, ...] = ()
) -> None:
    """Raise CommandError if the existing object differs from the revision's.

    Values that the revision leaves open may be anything.
    """
    for name, value in wanted.items():
        if name in _NOT_COMPARED or name in ignored or name not in existing:
            continue
        found = existing[name]
        if found != (dict(value) if isinstance(value, Mapping) else value):
            was = "another table" if name == "source" else repr(found)
            raise CommandError(f"{label} exists already with another {name}: {was}. HINT: {hint}")


def look(operations: Operations, query: str, **parameters: Any) -> dict[str, Any] | None:
    """Return the row that a query gives as one jsonb, or None."""
    found = scalar(operations, query, **parameters)
    # Some drivers parse jsonb, others do not.
    row: dict[str, Any] | None = json.loads(found) if isinstance(found, str) else found
    return row


def scalar(operations: Operations, query: str, **parameters: Any) -> Any:
    with reported():
        return operations.get_bind().execute(sqlalchemy.text(query), parameters).scalar()


def run(operations: Operations, statement: str) -> Any:
    """Run the statement and return its value, or write it to the script."""
    context = operations.get_context()
    if context.as_sql:
        context.impl.static_output(statement + ";")
        return None
    with reported():
        # Plain execution would take ":name" and "%" in a content expression for parameters.
        result = operations.get_bind().exec_driver_sql(statement, execution_options={"no_parameters": True})
        return result.scalar() if result.returns_rows else None


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn a database error into one that `alembic` prints without a traceback.

    Its hint is kept.
    """
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
