"""Find the tables that gates use and no metadata declares.

They are canaries, made by hand as docs/how-to/upgrade-a-model.md describes, and the demo's tables.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from embedline.client.migrations.catalogue import is_installed
from embedline.client.migrations.declaration import Declaration
from embedline.client.migrations.statements import literal

# Schema and name of a table.
TableName = tuple[str, str]

# Checked first, because a role that writes migrations may have no right on Embedline's tables, and a refusal ends the
# transaction.
_MAY_READ_GATES = """
    SELECT pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_table_privilege(c.oid, 'SELECT')
    FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = 'embedline' AND c.relname = 'evaluation'
"""
_NAMED_BY_GATES = """
    SELECT DISTINCT e.evidence ->> 'canaries' FROM embedline.evaluation AS e WHERE e.evidence ->> 'canaries' IS NOT NULL
"""
# By name, in the spelling of regclass or with the schema. Before the first gate a canary table is recognised by the
# name and the columns that the documentation asks for.
_TABLES = """
    SELECT n.nspname, c.relname FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    CROSS JOIN LATERAL (
        SELECT pg_catalog.array_agg(a.attname::text) AS names FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    ) AS k
    WHERE c.relkind IN ('r', 'p') AND (
        c.oid::pg_catalog.regclass::text = ANY ({named})
        OR pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) = ANY ({named})
        OR (c.relname ~ '(^|_)canar(y|ies)$' AND k.names @> '{{query,key}}' AND k.names <@ '{{query,key,grade}}')
        OR pg_catalog.obj_description(c.oid, 'pg_class') LIKE 'Embedline demo:%'
    )
"""


def find_canary_tables(
    connection: Connection, declaration: Declaration | None, config: Config | None
) -> frozenset[TableName]:
    """Return the tables that gates have used or will use.

    A declaration or a revision of the environment may name a table for a later gate.
    """
    if not is_installed(connection):
        return frozenset()
    named = {*_of_declaration(declaration), *_of_revisions(config), *_of_gates(connection)}
    query = _TABLES.format(named=literal(sorted(map(_spelled, named))))
    rows = connection.exec_driver_sql(query, execution_options={"no_parameters": True})
    return frozenset((schema, name) for schema, name in rows)


def _spelled(name: str) -> str:
    """Return a name as regclass writes it."""
    return name if '"' in name else name.lower()


def _of_declaration(declaration: Declaration | None) -> Iterator[str]:
    for pipeline in declaration.pipelines.values() if declaration else ():
        if pipeline.upgrade.canaries is not None:
            yield pipeline.upgrade.canaries


def _of_gates(connection: Connection) -> Iterator[str]:
    if connection.exec_driver_sql(_MAY_READ_GATES).scalar():
        yield from connection.exec_driver_sql(_NAMED_BY_GATES).scalars()


def _of_revisions(config: Config | None) -> Iterator[str]:
    """Yield the tables that cutovers in the environment's revisions name as constants.

    These revisions may not have run yet.
    """
    if config is None or config.get_alembic_option("script_location") is None:
        return
    for script in ScriptDirectory.from_config(config).walk_revisions():
        text = Path(script.path).read_text(encoding="utf-8", errors="replace")
        if "cutover_embedding_version" in text:
            yield from _of_cutovers(text)


def _of_cutovers(text: str) -> Iterator[str]:
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    for call in calls:
        if getattr(call.func, "attr", None) != "cutover_embedding_version":
            continue
        given = {argument.arg: argument.value for argument in call.keywords}
        named = given.get("canaries")
        if isinstance(named, ast.Constant) and isinstance(named.value, str):
            yield named.value
