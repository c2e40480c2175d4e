"""Serve `alembic revision --autogenerate` and `alembic check`.

Nothing of Embedline's is proposed to be dropped or created. The declaration in the TOML file is compared with the
database.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alembic import command, util
from alembic.operations.ops import MigrateOperation, MigrationScript, UpgradeOps
from sqlalchemy import Connection

from embedline.client.migrations import comparison
from embedline.client.migrations.canary_tables import TableName, find_canary_tables
from embedline.client.migrations.chain import PHASES, Upgrade, reversed_operations
from embedline.client.migrations.declaration import find_declaration
from embedline.core import names

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.runtime.migration import MigrationContext

    Hook = Callable[[MigrationContext, Any, list[MigrationScript]], None]

logger = logging.getLogger("alembic.embedline")

OWN_SCHEMAS = ("embedline", "embedline_data", "embedline_expression", "embedline_search")

# The views over generated tables, in the schemas of the sources; models may map them. Only the system's catalogue is
# read, because the author of migrations may have no right on Embedline's.
_VIEWS = """
    SELECT DISTINCT s.nspname, v.relname FROM pg_catalog.pg_depend AS d
    JOIN pg_catalog.pg_rewrite AS r ON r.oid = d.objid AND d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass
    JOIN pg_catalog.pg_class AS t ON t.oid = d.refobjid AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
    JOIN pg_catalog.pg_namespace AS n ON n.oid = t.relnamespace AND n.nspname = 'embedline_data'
    JOIN pg_catalog.pg_class AS v ON v.oid = r.ev_class JOIN pg_catalog.pg_namespace AS s ON s.oid = v.relnamespace
"""
# Triggers on the sources, which call functions of ours.
_TRIGGERS = """
    SELECT s.nspname, g.tgname FROM pg_catalog.pg_trigger AS g JOIN pg_catalog.pg_proc AS f ON f.oid = g.tgfoid
    JOIN pg_catalog.pg_namespace AS n ON n.oid = f.pronamespace AND n.nspname = 'embedline_data'
    JOIN pg_catalog.pg_class AS t ON t.oid = g.tgrelid JOIN pg_catalog.pg_namespace AS s ON s.oid = t.relnamespace
"""
# The only function outside our schemas, and the extensions that an installation creates.
_FUNCTIONS = {("public", "embed_pending")}
_EXTENSIONS = {"plpython3u", "vector", "pg_cron"}
_CRON = "SELECT EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'pg_cron')"


def hide_schemas(context: AutogenContext, schemas: set[str | None]) -> None:
    """Remove Embedline's schemas from the comparison.

    The schema of the pg_cron that its installation creates is removed, too.
    """
    schemas.difference_update(OWN_SCHEMAS)
    if (
        context.dialect.name == "postgresql"
        and "cron" in schemas
        and _connection(context).exec_driver_sql(_CRON).scalar()
    ):
        schemas.discard("cron")


def hide_canary_tables(context: AutogenContext) -> None:
    """Keep undeclared canary tables from being compared, and so from being dropped.

    They are tables that the metadata does not declare.
    """
    if context.dialect.name != "postgresql":
        return
    hidden = _undeclared_canary_tables(context)
    default = context.dialect.default_schema_name

    def is_compared(name: str | None, kind: str, parents: Mapping[str, str | None]) -> bool:
        if kind != "table" or (table := (parents.get("schema_name") or default, name)) not in hidden:
            return True
        logger.info("table %s.%s is left alone: gates use it, and the metadata does not declare it", *table)
        return False

    # If the list is missing, the table is compared, and hide_operations removes the resulting operations.
    filters = getattr(context, "_name_filters", None)
    if isinstance(filters, list):
        filters.append(is_compared)


def _undeclared_canary_tables(context: AutogenContext) -> frozenset[TableName]:
    config = context.migration_context.config
    default = context.dialect.default_schema_name
    declared = {(table.schema or default, table.name) for table in context.sorted_tables}
    return find_canary_tables(_connection(context), find_declaration(config), config) - declared


def hide_operations(context: AutogenContext, upgrade_ops: UpgradeOps) -> None:
    """Remove the operations proposed for Embedline's objects.

    They are tables, views, triggers and functions. Models that map Embedline's tables and views are not tables to
    create.
    """
    if context.dialect.name != "postgresql":
        return
    connection = _connection(context)
    default = context.dialect.default_schema_name
    own = {(schema, name) for schema, name in connection.exec_driver_sql(_VIEWS)} | _undeclared_canary_tables(context)
    triggers = {(schema, name) for schema, name in connection.exec_driver_sql(_TRIGGERS)}
    declaration = find_declaration(context.migration_context.config)
    to_come = {names.view(name) for name in declaration.pipelines} if declaration else set()

    def is_own(operation: MigrateOperation) -> bool:
        schema = getattr(operation, "schema", None) or default
        name = getattr(operation, "table_name", None)
        return schema in OWN_SCHEMAS or (schema, name) in own or name in to_come or is_own_entity(operation)

    def is_own_entity(operation: MigrateOperation) -> bool:
        # An operation of alembic_utils: functions, views, triggers and grants as entities with a schema and a
        # signature.
        entity = getattr(operation, "target", None)
        schema, signature = getattr(entity, "schema", None), getattr(entity, "signature", None)
        if not isinstance(schema, str) or not isinstance(signature, str):
            return False
        # A grant is one on a table; a function's signature has parameters.
        schema = schema.replace('"', "")
        name = str(getattr(entity, "table", None) or signature.partition("(")[0]).replace('"', "")
        is_extension = type(entity).__name__ == "PGExtension" and type(operation).__name__ == "DropOp"
        return (
            schema in OWN_SCHEMAS
            or (schema, name) in own | triggers | _FUNCTIONS
            or (is_extension and name in _EXTENSIONS)
        )

    upgrade_ops.ops[:] = [operation for operation in upgrade_ops.ops if not is_own(operation)]


def compare_pipelines(context: AutogenContext, upgrade_ops: UpgradeOps) -> None:
    """Add the operations that bring the database to the declaration.

    A changed model becomes a chain of revisions.
    """
    declaration = find_declaration(context.migration_context.config)
    if declaration is None or context.dialect.name != "postgresql":
        return
    from embedline.client.migrations import rendering

    changes = comparison.compare(_connection(context), declaration)
    upgrade_ops.ops[:0] = changes.drops
    upgrade_ops.ops.extend(changes.operations)
    if not changes.upgrades:
        return
    expansions = [operation for upgrade in changes.upgrades for operation in upgrade.operations("expand")]
    upgrade_ops.ops.extend(expansions)
    options = context.migration_context.opts
    if _only_checks(context):
        return
    if options.get("upgrade_token") == "upgrades":
        options["process_revision_directives"] = _following(
            options.get("process_revision_directives"), expansions, changes.upgrades
        )
    else:
        # One revision may serve several databases, and the others may have no such pipeline.
        for upgrade in changes.upgrades:
            last = upgrade.expand
            rendering.explain(last, [*last.info.get("embedline.comment", []), _BY_HAND.format(upgrade.pipeline)])


def _only_checks(context: AutogenContext) -> bool:
    """Return True in `alembic check`.

    It prints only the last revision, so there must be only one.
    """
    config = context.migration_context.config
    called = getattr(getattr(config, "cmd_opts", None), "cmd", None)
    return called is not None and called[0] is command.check


_BY_HAND = (
    "The revisions for index, cutover and contract: write them by hand, see docs/how-to/use-alembic.md; pipeline {}."
)


def _following(before: Hook | None, expansions: Sequence[MigrateOperation], upgrades: Sequence[Upgrade]) -> Hook:
    """Return the environment's own hook followed by ours.

    Ours adds a revision for each later phase of the chain.
    """

    def process(context: MigrationContext, revision: Any, directives: list[MigrationScript]) -> None:
        if before is not None:
            before(context, revision, directives)
        for directive in directives:
            operations = directive.upgrade_ops
            if operations is not None and any(expansion in operations.ops for expansion in expansions):
                directives.extend(_later_phases(directive, upgrades))
                return

    return process


def _later_phases(first: MigrationScript, upgrades: Sequence[Upgrade]) -> list[MigrationScript]:
    scripts: list[MigrationScript] = []
    head = first.rev_id
    for phase in PHASES[1:]:
        operations = [operation for upgrade in upgrades for operation in upgrade.operations(phase)]
        script = MigrationScript(
            util.rev_id(), UpgradeOps(list(operations)), reversed_operations(operations),
            message="; ".join(upgrade.message(phase) for upgrade in upgrades), head=head,
            version_path=first.version_path,
        )  # fmt: skip
        scripts.append(script)
        head = script.rev_id
    return scripts


def _connection(context: AutogenContext) -> Connection:
    assert context.connection is not None, "autogenerate has a connection"
    return context.connection
