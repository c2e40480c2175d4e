"""Render operations in a revision file.

Importing this registers it, once Alembic is complete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from alembic.autogenerate import renderers

from embedline.client.migrations.operations import PipelineOperation

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext

_COMMENT = "embedline.comment"
_WIDTH = 100

Operation = TypeVar("Operation", bound=PipelineOperation)


def explain(operation: Operation, lines: list[str]) -> Operation:
    """Have comment lines written before the operation; return it."""
    operation.info[_COMMENT] = lines
    return operation


@renderers.dispatch_for(PipelineOperation)
def render(context: AutogenContext, operation: PipelineOperation) -> str:
    """Return the comment and the call, in one line if it fits."""
    prefix = context.opts.get("alembic_module_prefix") or ""
    (_, name), *rest = operation.written().items()
    arguments = [repr(name), *(f"{key}={_value(value)}" for key, value in rest)]
    line = f"{prefix}{operation.operation}({', '.join(arguments)})"
    if len(line) > _WIDTH:
        line = f"{prefix}{operation.operation}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"
    return "\n".join([*(f"# {text}" for text in operation.info.get(_COMMENT, ())), line])


def _value(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
