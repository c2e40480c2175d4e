"""Keep the rows that tell subscribers which version serves.

The publication is PostgreSQL's own object, and no table of Embedline's repeats it. The routing table has one row for
each published version. A cutover changes it in its own transaction, so a subscriber gets both as one.
"""

from __future__ import annotations

from dataclasses import dataclass

from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.sql_text import quote_ident
from embedline.errors import NotReady
from embedline.postgres.relations import data_name
from embedline.postgres.session import Session

_EXISTS = "SELECT EXISTS (SELECT FROM pg_publication WHERE pubname = $1)"
_TABLES = """
    SELECT format('%I.%I', n.nspname, c.relname) AS name, c.oid::bigint AS number, pg_get_expr(r.prqual, r.prrelid) AS filter
    FROM pg_publication_rel AS r JOIN pg_publication AS p ON p.oid = r.prpubid
    JOIN pg_class AS c ON c.oid = r.prrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE p.pubname = $1 ORDER BY 1
"""
_HAS_ROUTING = """
    SELECT EXISTS (SELECT FROM pg_class WHERE relnamespace = 'embedline_data'::regnamespace AND relname = $1)
"""
_COLUMNS = "serves, model, query_prefix, model_fingerprint, fingerprint, dimensions, column_type, distance"
_NEW, _OLD = (", ".join(f"{row}.{c}" for c in _COLUMNS.split(", ")) for row in ("EXCLUDED", "r"))
# $1 is the pipeline, $2 the publication. A version that is not published is none that a subscriber could show.
_WRITE = f"""
    WITH wanted AS (
        SELECT v.number AS version, v.version_id = p.serving_version_id AS serves, m.model, m.query_prefix,
            m.fingerprint AS model_fingerprint, v.fingerprint, v.dimensions, v.column_type, v.distance
        FROM embedline.pipeline AS p JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id
        JOIN embedline.model AS m ON m.model_id = v.model_id
        WHERE p.pipeline_id = $1 AND EXISTS (
            SELECT FROM pg_publication_rel AS r JOIN pg_publication AS b ON b.oid = r.prpubid
            JOIN pg_class AS c ON c.oid = r.prrelid
            WHERE b.pubname = $2 AND c.relnamespace = 'embedline_data'::regnamespace
                AND c.relname = p.name || '_v' || v.number)
    ), gone AS (
        DELETE FROM {{routing}} AS r WHERE NOT EXISTS (SELECT FROM wanted AS w WHERE w.version = r.version)
    )
    INSERT INTO {{routing}} AS r (version, {_COLUMNS}) SELECT version, {_COLUMNS} FROM wanted
    ON CONFLICT (version) DO UPDATE SET ({_COLUMNS}) = ROW({_NEW}) WHERE ({_OLD}) IS DISTINCT FROM ({_NEW})
"""
# Roles that may read the routing table: those of subscribers.
_READERS = """
    SELECT DISTINCT pg_get_userbyid(a.grantee)::text AS role FROM pg_class AS c, aclexplode(c.relacl) AS a
    WHERE c.relnamespace = 'embedline_data'::regnamespace AND c.relname = $1 AND a.privilege_type = 'SELECT'
        AND a.grantee NOT IN (0, c.relowner)
    ORDER BY 1
"""
# USAGE that a role has and no subscription of it needs any more.
_IDLE = """
    SELECT NOT EXISTS (
        SELECT FROM pg_class AS c, aclexplode(c.relacl) AS a
        WHERE c.relnamespace = 'embedline_data'::regnamespace AND pg_get_userbyid(a.grantee) = $1)
"""


def is_published(session: Session, name: str) -> bool:
    """Return True if the pipeline has a publication."""
    return bool(session.scalar(_EXISTS, ["text"], names.publication(name)))


@dataclass(frozen=True)
class PublishedTable:
    """A table of a publication, with its name qualified and quoted as needed."""

    oid: int
    name: str
    filter: str | None

    @property
    def is_generated(self) -> bool:
        """Return True if the table is Embedline's own."""
        return self.name.startswith("embedline_data.")


def published_tables(session: Session, name: str) -> list[PublishedTable]:
    """Return the tables of the pipeline's publication."""
    rows = session.query(_TABLES, ["text"], names.publication(name))
    return [PublishedTable(int(row["number"]), str(row["name"]), row["filter"]) for row in rows]


def table_oid(session: Session, name: str) -> int | None:
    """Return the number of a table by its qualified name, None if there is none."""
    number: int | None = session.scalar("SELECT to_regclass($1)::oid::bigint", ["text"], name)
    return number


def routing_table(name: str) -> str:
    """Return the qualified, quoted name of the table of published versions."""
    return data_name(names.generated(name, "routing"))


def has_routing(session: Session, name: str) -> bool:
    """Return True if the pipeline has a table of published versions."""
    return bool(session.scalar(_HAS_ROUTING, ["text"], names.generated(name, "routing")))


def write_routing(session: Session, pipeline: Pipeline) -> None:
    """Bring the rows of the published versions up to date.

    Does nothing without a publication. Rows that are right already are left alone.
    """
    if has_routing(session, pipeline.name):
        session.query(
            _WRITE.format(routing=routing_table(pipeline.name)),
            ["bigint", "text"], pipeline.pipeline_id, names.publication(pipeline.name),
        )  # fmt: skip


def require_published(session: Session, target: Pipeline) -> None:
    """Raise NotReady if the pipeline has a publication that lacks the version.

    Its subscribers would go on with the version of before, which goes one day.
    """
    if not is_published(session, target.name):
        return
    there = {table.oid for table in published_tables(session, target.name)}
    if there.issuperset(table_oid(session, table) for table in (target.chunk, target.vectors)):
        return
    name, number = target.name, target.version.number
    raise NotReady(
        f'version {number} of pipeline "{name}" is not published',
        detail=f"Subscribers of {names.publication(name)} could not follow the cutover.",
        hint=f"Run the text of SELECT embedline.subscriber_ddl('{name}'); on each subscriber, then"
        f" SELECT * FROM embedline.publication('{name}', tables_created => true); here, and"
        f" ALTER SUBSCRIPTION {names.publication(name)} REFRESH PUBLICATION; there.",
    )


def subscriber_roles(session: Session, name: str) -> list[str]:
    """Return the roles that may copy the published tables."""
    return [str(row["role"]) for row in session.query(_READERS, ["text"], names.generated(name, "routing"))]


def remove(session: Session, name: str) -> bool:
    """Drop the publication, its table of versions, and the rights of its roles.

    Returns False if there is no publication.
    """
    found = is_published(session, name)
    if found:
        ours = [table.name for table in published_tables(session, name) if table.is_generated]
        roles = subscriber_roles(session, name)
        for role in roles:
            session.execute(f"REVOKE SELECT ON {', '.join(ours)} FROM {quote_ident(role)}")
        session.execute(f"DROP PUBLICATION {quote_ident(names.publication(name))}")
        for role in roles:
            if session.scalar(_IDLE, ["text"], role):
                session.execute(f"REVOKE USAGE ON SCHEMA embedline_data FROM {quote_ident(role)}")
    if has_routing(session, name):
        session.execute(f"DROP TABLE {routing_table(name)}")
    return found
