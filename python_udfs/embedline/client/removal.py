"""Remove the pipelines before the revisions of `downgrade base`.

Dependent objects are searched first. A revision's downgrade goes back by one release, and refuses a state that the
earlier release does not know. On the way to base no state has to be kept: without pipelines each downgrade passes.

All of it is SQL, so that a server whose package is gone or broken can be cleaned, too. `alembic downgrade head:base
--sql` can render it, as well.
"""

from __future__ import annotations

from sqlalchemy import Connection

from embedline.errors import DependentObjects

# Routing views and the views of versions are in the sources' schemas. A column of a later revision does not exist
# before it.
_VIEWS = """
    SELECT c.oid FROM (
        SELECT p.routing_view::oid FROM embedline.pipeline AS p
        UNION
        SELECT to_regclass(to_jsonb(n) ->> 'view')::oid FROM embedline.version AS n
    ) AS v (relation)
    JOIN pg_catalog.pg_class AS c ON c.oid = v.relation
"""
_SCHEMAS = """
    SELECT n.oid FROM pg_catalog.pg_namespace AS n
    WHERE n.nspname IN ('embedline', 'embedline_data', 'embedline_expression', 'embedline_search')
"""
# Objects of others that PostgreSQL knows to need one of ours. For a rule, a default, a constraint or a policy the table
# or view counts. Triggers that call our functions are ours.
_DEPENDENTS = f"""
    WITH schema AS ({_SCHEMAS}),
    ours AS (
        SELECT 'pg_class'::regclass AS class, c.oid FROM pg_catalog.pg_class AS c
        WHERE c.relnamespace IN (SELECT s.oid FROM schema AS s) OR c.oid IN ({_VIEWS})
        UNION ALL
        SELECT 'pg_proc'::regclass, f.oid FROM pg_catalog.pg_proc AS f
        WHERE f.pronamespace IN (SELECT s.oid FROM schema AS s)
            OR f.oid = to_regprocedure('public.embed_pending(integer, text)')
        UNION ALL
        SELECT 'pg_type'::regclass, t.oid FROM pg_catalog.pg_type AS t
        LEFT JOIN pg_catalog.pg_class AS c ON c.oid = t.typrelid
        WHERE t.typnamespace IN (SELECT s.oid FROM schema AS s) OR c.oid IN ({_VIEWS})
    ),
    dependent AS (
        SELECT
            CASE
                WHEN d.classid IN ('pg_rewrite'::regclass, 'pg_attrdef'::regclass, 'pg_policy'::regclass)
                    THEN 'pg_class'::regclass
                ELSE d.classid
            END AS class,
            CASE d.classid
                WHEN 'pg_rewrite'::regclass THEN (SELECT r.ev_class FROM pg_catalog.pg_rewrite AS r WHERE r.oid = d.objid)
                WHEN 'pg_attrdef'::regclass THEN (SELECT a.adrelid FROM pg_catalog.pg_attrdef AS a WHERE a.oid = d.objid)
                WHEN 'pg_policy'::regclass THEN (SELECT p.polrelid FROM pg_catalog.pg_policy AS p WHERE p.oid = d.objid)
                ELSE d.objid
            END AS oid,
            d.classid AS by_class,
            d.objid AS by_oid
        FROM pg_catalog.pg_depend AS d
        JOIN ours AS o ON o.class = d.refclassid AND o.oid = d.refobjid
        WHERE d.deptype = 'n' AND d.classid NOT IN ('pg_trigger'::regclass, 'pg_event_trigger'::regclass)
    )
    SELECT DISTINCT
        pg_catalog.pg_describe_object(e.class, e.oid, 0) AS description,
        CASE e.by_class
            WHEN 'pg_attrdef'::regclass THEN (
                SELECT format('ALTER TABLE %s ALTER COLUMN %I DROP DEFAULT;', a.attrelid::regclass, a.attname)
                FROM pg_catalog.pg_attrdef AS f
                JOIN pg_catalog.pg_attribute AS a ON a.attrelid = f.adrelid AND a.attnum = f.adnum
                WHERE f.oid = e.by_oid)
            WHEN 'pg_policy'::regclass THEN (
                SELECT format('DROP POLICY %I ON %s;', p.polname, p.polrelid::regclass)
                FROM pg_catalog.pg_policy AS p WHERE p.oid = e.by_oid)
            WHEN 'pg_constraint'::regclass THEN (
                SELECT format('ALTER TABLE %s DROP CONSTRAINT %I;', k.conrelid::regclass, k.conname)
                FROM pg_catalog.pg_constraint AS k WHERE k.oid = e.by_oid)
            ELSE (
                SELECT format('DROP %s %s;', upper(i.type), i.identity)
                FROM pg_catalog.pg_identify_object(e.class, e.oid, 0) AS i)
        END AS remedy
    FROM dependent AS e
    WHERE NOT EXISTS (SELECT FROM ours AS o WHERE o.class = e.class AND o.oid = e.oid)
        AND NOT EXISTS (
            SELECT FROM pg_catalog.pg_constraint AS k JOIN ours AS o ON o.class = 'pg_class'::regclass AND o.oid = k.conrelid
            WHERE e.class = 'pg_constraint'::regclass AND k.oid = e.oid)
    ORDER BY description
"""
_REMOVE = f"""
    DO $do$
    DECLARE
        doomed text;
        messages text := current_setting('client_min_messages');
    BEGIN
        -- Workers begin each step with this table, holding no lock. They end when it is gone, without a deadlock.
        LOCK TABLE embedline.worker;
        -- They would fire for each statement below.
        FOR doomed IN
            SELECT format('DROP EVENT TRIGGER %I', e.evtname) FROM pg_catalog.pg_event_trigger AS e
            JOIN pg_catalog.pg_proc AS f ON f.oid = e.evtfoid WHERE f.pronamespace = 'embedline'::regnamespace
        LOOP
            EXECUTE doomed;
        END LOOP;
        FOR doomed IN
            SELECT format('DROP TRIGGER %I ON %s', t.tgname, t.tgrelid::regclass) FROM pg_catalog.pg_trigger AS t
            JOIN pg_catalog.pg_proc AS f ON f.oid = t.tgfoid
            WHERE f.pronamespace = 'embedline_data'::regnamespace AND t.tgparentid = 0
        LOOP
            EXECUTE doomed;
        END LOOP;
        FOR doomed IN SELECT format('DROP VIEW %s', v.oid::regclass) FROM ({_VIEWS}) AS v LOOP
            EXECUTE doomed;
        END LOOP;
        -- Without its tables a publication would stay, empty.
        FOR doomed IN
            SELECT format('DROP PUBLICATION %I', p.pubname) FROM pg_catalog.pg_publication AS p WHERE EXISTS (
                SELECT FROM pg_catalog.pg_publication_rel AS r JOIN pg_catalog.pg_class AS c ON c.oid = r.prrelid
                WHERE r.prpubid = p.oid AND c.relnamespace = 'embedline_data'::regnamespace
                    AND p.pubname = 'embedline_' || left(c.relname, -length('_routing'))
                    AND right(c.relname, length('_routing')) = '_routing')
        LOOP
            EXECUTE doomed;
        END LOOP;
        PERFORM set_config('client_min_messages', 'warning', true);
        -- Not DELETE: an index that a revision builds in this transaction would still have the deleted rows in it.
        TRUNCATE embedline.pipeline CASCADE;
        -- Nothing of others needs what is in these: see require_no_dependents. The revisions want the schemas to be there.
        FOR doomed IN
            SELECT n.nspname FROM pg_catalog.pg_namespace AS n
            WHERE n.nspname IN ('embedline_data', 'embedline_expression', 'embedline_search')
        LOOP
            EXECUTE format('DROP SCHEMA %I CASCADE', doomed);
            EXECUTE format('CREATE SCHEMA %I', doomed);
        END LOOP;
        -- The revisions have something to say: which extensions and roles stay.
        PERFORM set_config('client_min_messages', messages, true);
    END
    $do$
"""
# Alembic needs its version table until all revisions are done; then it is removed as the last trace. If any other
# object is left, no downgrade led here, because `stamp base` only forgets the database's revision.
_END = """
    DO $do$
    BEGIN
        IF NOT EXISTS (
            SELECT FROM pg_catalog.pg_class AS c
            WHERE c.relnamespace = 'embedline'::regnamespace AND c.relkind NOT IN ('i', 't') AND c.relname <> 'alembic_version')
        THEN
            DROP TABLE IF EXISTS embedline.alembic_version;
            DROP SCHEMA embedline;
        END IF;
    END
    $do$
"""


def before_base() -> tuple[str, ...]:
    """Return the statements that remove every pipeline.

    Then no revision's downgrade has a state to refuse.
    """
    return (_REMOVE,)


def after_base() -> tuple[str, ...]:
    """Return the statements that remove the objects that Alembic needed until the end."""
    return (_END,)


def require_no_dependents(connection: Connection) -> None:
    """Raise DependentObjects if objects of others need ours.

    They would be dropped with ours, or stop the removal half-way.
    """
    if connection.exec_driver_sql("SELECT to_regclass('embedline.version')").scalar() is None:
        return
    rows = connection.exec_driver_sql(_DEPENDENTS, execution_options={"no_parameters": True}).all()
    if rows:
        raise DependentObjects(
            "objects of yours depend on Embedline's",
            detail=", ".join(str(row.description) for row in rows) + ".",
            hint=" ".join(dict.fromkeys(str(row.remedy) for row in rows)),
        )
