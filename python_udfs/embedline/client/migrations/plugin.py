"""Register operations and comparisons with Alembic, for any environment.

Alembic loads this through its entry point group `alembic.plugins`. The entry point is named
alembic.autogenerate.embedline, because an environment without a setting compares only with the plugins
alembic.autogenerate.*. The setting `autogenerate_plugins=["alembic.autogenerate.*", "~alembic.autogenerate.embedline"]`
leaves it out.

Every `import alembic` beside an installed embedline imports this, before Alembic is complete. So it imports nothing
heavy, and nothing of alembic.autogenerate.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from alembic.util import DispatchPriority

from embedline.client.migrations import index_operations, operations, pipeline_operations, version_operations

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.operations.ops import UpgradeOps
    from alembic.runtime.plugins import Plugin

__all__ = ["index_operations", "operations", "pipeline_operations", "setup", "version_operations"]


def setup(plugin: Plugin) -> None:
    """Register the hooks of autogenerate.

    The operations were registered when they were imported.
    """
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
    # Alembic up to 1.19 iterates over the object that an entry point loads, later ones want the module itself. This is
    # both.
    def __iter__(self) -> Iterator[ModuleType]:
        yield self


sys.modules[__name__].__class__ = _Entry
