"""Publish exactly the tables with which another server searches a pipeline."""

from __future__ import annotations

from embedline.catalog.rights import require_control
from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.recipe import Expressions
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.errors import InvalidParameter, NotFound, NotReady
from embedline.pipelines import published
from embedline.pipelines.expressions import deparsed
from embedline.pipelines.plan import current_plan
from embedline.pipelines.state import load_alone
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import bound_lock_wait
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import sqlstate_of
from embedline.replication.tables import routing_statements, source_is_published, version_tables

# Tables that PostgreSQL would refuse to change once they are published: the source itself, or the leaves of its partitions.
_WITHOUT_IDENTITY = """
    SELECT c.oid::regclass::text AS name FROM pg_class AS c
    WHERE c.oid IN (SELECT $1::oid UNION SELECT relid FROM pg_partition_tree($1::oid::regclass) WHERE isleaf)
        AND c.relkind = 'r' AND c.relreplident <> 'f' AND NOT EXISTS (
            SELECT FROM pg_index AS i WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
                AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END)
    ORDER BY 1 LIMIT 1
"""
# A unique index that could be the identity of such a table.
_POSSIBLE_IDENTITY = """
    SELECT c.relname FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
    WHERE i.indrelid = $1::regclass AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL
        AND i.indexprs IS NULL AND NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = i.indrelid
            AND a.attnum = ANY ((i.indkey::smallint[])[0:i.indnkeyatts - 1]) AND NOT a.attnotnull)
    ORDER BY i.indnkeyatts, 1 LIMIT 1
"""
# Columns of a row filter that an UPDATE or a DELETE does not send. $1 is the publication, $2 the source.
_OUTSIDE_IDENTITY = """
    SELECT string_agg(DISTINCT a.attname::text, ', ') AS columns FROM pg_publication_rel AS r
    JOIN pg_publication AS p ON p.oid = r.prpubid
    JOIN pg_depend AS d ON d.classid = 'pg_publication_rel'::regclass AND d.objid = r.oid
        AND d.refclassid = 'pg_class'::regclass AND d.refobjid = r.prrelid AND d.refobjsubid > 0
    JOIN pg_attribute AS a ON a.attrelid = r.prrelid AND a.attnum = d.refobjsubid
    CROSS JOIN LATERAL (
        SELECT c.oid, c.relreplident FROM pg_class AS c WHERE c.relkind = 'r' AND c.oid IN (
            SELECT r.prrelid UNION SELECT relid FROM pg_partition_tree(r.prrelid) WHERE isleaf)
    ) AS t
    WHERE p.pubname = $1 AND r.prrelid = $2::oid AND t.relreplident <> 'f' AND NOT EXISTS (
        SELECT FROM pg_index AS i JOIN pg_attribute AS k ON k.attrelid = t.oid
            AND k.attnum = ANY ((i.indkey::smallint[])[0:i.indnkeyatts - 1])
        WHERE i.indrelid = t.oid AND k.attname = a.attname
            AND CASE t.relreplident WHEN 'd' THEN i.indisprimary ELSE i.indisreplident END)
"""

_IS_ROLE = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)"
# A member of the role, itself included, who could do more with a name of a generated table than a subscriber. Readers may
# SELECT them all. An owner of a source or of events could alter functions that run in the owner's name.
_KNOWN_MEMBER = """
    SELECT m.rolname FROM pg_roles AS m
    WHERE NOT m.rolsuper AND pg_has_role(m.oid, $1::name, 'MEMBER') AND (
        pg_has_role(m.oid, 'embedline_reader', 'MEMBER') OR pg_has_role(m.oid, 'embedline_worker', 'MEMBER')
        OR EXISTS (SELECT FROM pg_class AS c WHERE pg_has_role(m.oid, c.relowner, 'MEMBER') AND c.oid IN (
            SELECT p.source FROM embedline.pipeline AS p UNION ALL SELECT d.events FROM embedline.derived AS d)))
    ORDER BY m.rolname <> $1, 1 LIMIT 1
"""
# They have rights on the generated tables of their own.
_OUR_ROLES = ("embedline_admin", "embedline_worker", "embedline_reader")


@entry_point
def publication(
    session: Session,
    name: str,
    with_source: bool | None,
    source_filter: str | None,
    tables_created: bool,
    subscriber_role: str | None,
) -> list[dict[str, object]]:
    """Publish a pipeline, or bring its publication up to date.

    Returns the published tables.

    Raises NotReady if tables join a publication that has subscribers, unless these have the tables already.
    """
    require_control(session, name)
    bound_lock_wait(session)
    pipeline = load_alone(session, name, holds_source=False)
    _, source = current_plan(session, pipeline)
    before = published.published_tables(session, name)
    has_source = source_is_published(session, pipeline) if with_source is None else with_source
    if source_filter is not None and not has_source:
        raise InvalidParameter(
            "source_filter filters rows of the source, which is not published",
            hint=f"SELECT * FROM embedline.publication('{name}', with_source => true, source_filter => '...');",
        )
    if has_source:
        _require_identity(session, source)
    if not published.has_routing(session, name):
        for statement in routing_statements(name):
            session.execute(statement)
    wanted = version_tables(session, name) + ([source.qualified] if has_source else [])
    numbers = {table: published.table_oid(session, table) for table in wanted}
    known = {table.oid for table in before}
    added = [table for table in wanted if numbers[table] not in known]
    exists = published.is_published(session, name)
    if exists and added and not tables_created:
        raise _unprepared(name, added)
    _write(session, pipeline, wanted, source.qualified, _filter(session, source, before, source_filter))
    _require_sent_columns(session, pipeline, source)
    published.write_routing(session, pipeline)
    _grant(session, pipeline, source, subscriber_role)
    return [
        {"publication": names.publication(name), "published_table": table.name, "is_new": table.oid not in known}
        for table in published.published_tables(session, name)
    ]


@entry_point
def drop_publication(session: Session, name: str) -> None:
    """Stop publishing a pipeline. Subscriptions have to be dropped before."""
    require_control(session, name)
    bound_lock_wait(session)
    load_alone(session, name, holds_source=False)
    if not published.remove(session, name):
        raise NotFound(
            f'pipeline "{name}" has no publication', hint=f"SELECT * FROM embedline.publication('{name}'); makes one."
        )


def _unprepared(name: str, added: list[str]) -> NotReady:
    subscription = names.publication(name)
    return NotReady(
        f"publication {subscription} would publish {', '.join(added)}, which its subscribers may lack",
        detail="A subscriber without a published table stops at the first change of that table.",
        hint=f"Run the text of SELECT embedline.subscriber_ddl('{name}'); on each subscriber, then"
        f" SELECT * FROM embedline.publication('{name}', tables_created => true); here, and"
        f" ALTER SUBSCRIPTION {subscription} REFRESH PUBLICATION; there.",
    )


def _require_identity(session: Session, source: Source) -> None:
    """Raise NotReady if the source has no replica identity.

    PostgreSQL would refuse every UPDATE and DELETE of it, once it is published.
    """
    table = session.scalar(_WITHOUT_IDENTITY, ["bigint"], source.oid)
    if table is None:
        return
    index = session.scalar(_POSSIBLE_IDENTITY, ["text"], table)
    identity = "FULL" if index is None else f"USING INDEX {quote_ident(index)}"
    raise NotReady(
        f"{table} has no replica identity, so PostgreSQL would refuse UPDATE and DELETE of it once it is published",
        hint=f"ALTER TABLE {table} REPLICA IDENTITY {identity};",
    )


def _filter(
    session: Session, source: Source, before: list[published.PublishedTable], source_filter: str | None
) -> str | None:
    """Return the row filter of the source, the one of before if none is given."""
    if source_filter is None:
        return next((table.filter for table in before if table.oid == source.oid), None)
    given = deparsed(session, source, Expressions(filter=source_filter), "pg_catalog")
    return given["filter"].text


def _write(session: Session, pipeline: Pipeline, tables: list[str], source: str, source_filter: str | None) -> None:
    items = [
        f"{table} WHERE ({source_filter})" if table == source and source_filter is not None else table
        for table in tables
    ]
    name = quote_ident(names.publication(pipeline.name))
    if published.is_published(session, pipeline.name):
        statement = f"ALTER PUBLICATION {name} SET TABLE {', '.join(items)}"
    else:
        # The subscriber's copy of a partitioned source is one table.
        statement = f"CREATE PUBLICATION {name} FOR TABLE {', '.join(items)} WITH (publish_via_partition_root = true)"
    try:
        session.execute(statement)
    except session.plpy.SPIError as error:
        if source_filter is None or sqlstate_of(error)[:2] not in ("0A", "22", "42"):
            raise
        detail = (getattr(error, "spidata", None) or (None, None))[1]
        raise InvalidParameter(f"source_filter is no row filter of a publication: {error}", detail=detail) from error
    comment = f"Embedline pipeline {pipeline.name}: what a subscriber needs to search it"
    session.execute(f"COMMENT ON PUBLICATION {name} IS {quote_literal(comment)}")


def _require_sent_columns(session: Session, pipeline: Pipeline, source: Source) -> None:
    """Raise InvalidParameter if the row filter names a column that is not sent.

    Only those of the replica identity are sent with an UPDATE or a DELETE.

    PostgreSQL takes such a filter, and then refuses each UPDATE and DELETE of the application.
    """
    columns = session.scalar(
        _OUTSIDE_IDENTITY, ["text", "bigint"], names.publication(pipeline.name), source.oid
    )  # fmt: skip
    if columns is not None:
        raise InvalidParameter(
            f"source_filter names {columns}, which is not in the replica identity of {source.qualified}",
            detail="PostgreSQL would refuse every UPDATE and DELETE of the table.",
            hint=f"Filter on columns of the key, or ALTER TABLE {source.qualified} REPLICA IDENTITY FULL;",
        )


def _grant(session: Session, pipeline: Pipeline, source: Source, role: str | None) -> None:
    """Let the roles of subscribers copy Embedline's tables.

    The source's owner grants the source.
    """
    if role is not None and not session.scalar(_IS_ROLE, ["text"], role):
        raise NotFound(f'there is no role "{role}"', hint="CREATE ROLE replicator LOGIN REPLICATION;")
    if role is not None:
        _require_apart(session, source, role)
    roles = {*published.subscriber_roles(session, pipeline.name), *([] if role is None else [role])}
    ours = [table.name for table in published.published_tables(session, pipeline.name) if table.is_generated]
    for each in sorted(roles):
        session.execute(f"GRANT USAGE ON SCHEMA embedline_data TO {quote_ident(each)}")
        session.execute(f"GRANT SELECT ON {', '.join(ours)} TO {quote_ident(each)}")


def _require_apart(session: Session, source: Source, role: str) -> None:
    """Raise InvalidParameter if a member of the role has other rights on our tables.

    A reader who can name the schema of the tables is shown what the sources of other pipelines hide.
    """
    hint = "Create a role for subscribers: CREATE ROLE replicator LOGIN REPLICATION;"
    member = session.scalar(_KNOWN_MEMBER, ["text"], role)
    if role in (source.owner, *_OUR_ROLES) or member == role:
        raise InvalidParameter(
            f'"{role}" has rights on the tables already, which would go with the publication', hint=hint
        )
    if member is not None:
        raise InvalidParameter(
            f'"{role}" has a member, "{member}", that is a reader of Embedline or owns a source',
            detail="It could then read the tables of all pipelines, which no source guards.",
            hint=hint,
        )
