"""Define what all operations of revisions have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from alembic.operations import MigrateOperation

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
