"""What Alembic loads through its entry point group `alembic.plugins`: operations and comparisons for any environment.

The entry point is named alembic.autogenerate.embedline, because an environment that says nothing compares with the plugins
alembic.autogenerate.* only; `autogenerate_plugins=["alembic.autogenerate.*", "~alembic.autogenerate.embedline"]` leaves it out.

This is imported by every `import alembic` beside an installed embedline, in the middle of it: nothing heavy here, and
nothing of alembic.autogenerate, which is not complete yet.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from alembic.util import DispatchPriority

from embedline.client.migrations import implementation, operations

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.operations.ops import UpgradeOps
    from alembic.runtime.plugins import Plugin

__all__ = ["implementation", "operations", "setup"]


def setup(plugin: Plugin) -> None:
    """Register what autogenerate calls; the operations are there since they were imported."""
    register: Any = plugin.add_autogenerate_comparator
    register(_hide, "schema", "embedline", priority=DispatchPriority.FIRST)
    register(_compare, "schema", "embedline", priority=DispatchPriority.LAST)


def _hide(context: AutogenContext, upgrade_ops: UpgradeOps, schemas: set[str | None]) -> None:
    from embedline.client.migrations import autogenerate

    autogenerate.hide_schemas(context, schemas)
    autogenerate.hide_canary_tables(context)


def _compare(context: AutogenContext, upgrade_ops: UpgradeOps, schemas: set[str | None]) -> None:
    from embedline.client.migrations import autogenerate

    autogenerate.hide_operations(context, upgrade_ops)
    autogenerate.compare_pipelines(context, upgrade_ops)


class _Entry(ModuleType):
    # Alembic up to 1.19 iterates over what an entry point loads, later ones want the module itself: this is both.
    def __iter__(self) -> Iterator[ModuleType]:
        yield self


sys.modules[__name__].__class__ = _Entry
