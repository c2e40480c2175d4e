"""Drop views and create them again with their grants, options and dependent views.

PostgreSQL refuses to change the type of a column that a view shows, and to drop a view that others are built on. Each
view is kept with everything that its creator could have declared: owner, grants, comments, options.

Some dependent objects cannot be created again from their definition, such as a table with a column of the view's row
type. They are refused by name before any view is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any

from embedline.core.sql_text import quote_ident, quote_literal
from embedline.errors import DependentObjects
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import sqlstate_of

# Grants on a view and on single columns of it.
GRANTS = """
    SELECT g.privilege_type, g.is_grantable, NULL::text AS column,
        CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE g.grantee::regrole::text END AS grantee
    FROM pg_class AS c, aclexplode(c.relacl) AS g WHERE c.oid = $1::oid AND g.grantee <> c.relowner
    UNION ALL
    SELECT g.privilege_type, g.is_grantable, quote_ident(a.attname),
        CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE g.grantee::regrole::text END
    FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid, aclexplode(a.attacl) AS g
    WHERE c.oid = $1::oid AND g.grantee <> c.relowner
"""
_GRANTEES = """
    SELECT DISTINCT CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE g.grantee::regrole::text END AS grantee
    FROM pg_class AS c, aclexplode(c.relacl) AS g WHERE c.oid = $1::regclass AND g.grantee <> c.relowner
"""
COLUMN_COMMENTS = """
    SELECT quote_ident(a.attname) AS column, col_description(a.attrelid, a.attnum) AS comment FROM pg_attribute AS a
    WHERE a.attrelid = $1::oid AND a.attnum > 0 AND col_description(a.attrelid, a.attnum) IS NOT NULL
"""
_CHILDREN = """
    SELECT DISTINCT d.refobjid::bigint AS parent, r.ev_class::bigint AS child
    FROM pg_depend AS d JOIN pg_rewrite AS r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
    JOIN pg_class AS c ON c.oid = r.ev_class AND c.relkind IN ('v', 'm') AND c.relpersistence <> 't'
    WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY ($1::oid[]) AND r.ev_class <> d.refobjid
        AND r.rulename = '_RETURN'
        AND NOT EXISTS (SELECT FROM pg_depend AS e WHERE e.classid = 'pg_class'::regclass AND e.objid = c.oid
            AND e.deptype = 'e')
"""
# Objects outside the views that depend on them or their row types: functions, tables, policies, temporary views.
_OBSTACLES = """
    SELECT DISTINCT CASE WHEN r.oid IS NULL THEN pg_describe_object(d.classid, d.objid, d.objsubid)
        ELSE pg_describe_object('pg_class'::regclass, r.ev_class, 0) END AS object
    FROM pg_depend AS d
    LEFT JOIN pg_rewrite AS r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
    LEFT JOIN pg_trigger AS t ON d.classid = 'pg_trigger'::regclass AND t.oid = d.objid
    LEFT JOIN pg_attrdef AS f ON d.classid = 'pg_attrdef'::regclass AND f.oid = d.objid
    LEFT JOIN pg_index AS i ON d.classid = 'pg_class'::regclass AND i.indexrelid = d.objid
    WHERE ((d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY ($1::oid[]))
            OR (d.refclassid = 'pg_type'::regclass AND d.refobjid IN (
                SELECT unnest(ARRAY[y.oid, y.typarray]) FROM pg_type AS y WHERE y.typrelid = ANY ($1::oid[]))))
        AND d.deptype IN ('n', 'a')
        AND coalesce(r.ev_class, t.tgrelid, f.adrelid, i.indrelid, 0) <> ALL ($1::oid[])
    ORDER BY 1
"""
_VIEW = """
    SELECT c.oid::bigint AS oid, n.nspname AS schema, c.relname AS name, c.relkind::text AS kind,
        pg_get_userbyid(c.relowner) AS owner, coalesce(c.reloptions, '{}') AS options, pg_get_viewdef(c.oid) AS definition,
        obj_description(c.oid, 'pg_class') AS comment, c.relispopulated AS is_populated,
        (SELECT m.amname FROM pg_am AS m WHERE m.oid = c.relam) AS method,
        (SELECT s.spcname FROM pg_tablespace AS s WHERE s.oid = c.reltablespace) AS tablespace,
        (SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_attribute AS a
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = $1::oid
"""
_DEFAULTS = """
    SELECT quote_ident(a.attname) AS column, pg_get_expr(f.adbin, f.adrelid) AS expression
    FROM pg_attrdef AS f JOIN pg_attribute AS a ON a.attrelid = f.adrelid AND a.attnum = f.adnum WHERE f.adrelid = $1::oid
"""
# Triggers, rules and indexes, with the statements that restore an index's name and the state of a rule or a trigger.
_PARTS = """
    SELECT pg_get_triggerdef(t.oid) AS definition,
        CASE t.tgenabled WHEN 'D' THEN format('DISABLE TRIGGER %I', t.tgname) END AS state,
        format('TRIGGER %I ON %%s', t.tgname) AS object, obj_description(t.oid, 'pg_trigger') AS comment, NULL::name AS index
    FROM pg_trigger AS t WHERE t.tgrelid = $1::oid AND NOT t.tgisinternal
    UNION ALL
    SELECT pg_get_ruledef(r.oid), NULL, format('RULE %I ON %%s', r.rulename), obj_description(r.oid, 'pg_rewrite'), NULL
    FROM pg_rewrite AS r WHERE r.ev_class = $1::oid AND r.rulename <> '_RETURN'
    UNION ALL
    SELECT pg_get_indexdef(i.indexrelid), CASE WHEN i.indisclustered THEN format('CLUSTER ON %I', c.relname) END,
        format('INDEX %I.%I', n.nspname, c.relname), obj_description(c.oid, 'pg_class'), c.relname
    FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE i.indrelid = $1::oid
    ORDER BY 3
"""
_STATISTICS = """
    SELECT quote_ident(a.attname) AS column, a.attstattarget AS target FROM pg_attribute AS a
    WHERE a.attrelid = $1::oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attstattarget >= 0
"""
# SQLSTATEs if a view no longer fits its relations: a column, an operator or a function is gone or has another type.
_NO_LONGER_FITS = ("42703", "42883", "42804", "42725", "42P01", "42601", "42P16", "42846", "22P02", "42702")


@dataclass
class KeptView:
    """A view with its declarations, whether it still exists or not.

    `definition` is its query.
    """

    oid: int
    schema: str
    name: str
    kind: str
    owner: str
    options: list[str]
    definition: str
    columns: list[str]
    comment: str | None
    is_populated: bool
    method: str | None
    tablespace: str | None
    grants: list[dict[str, Any]] = field(default_factory=list)
    column_comments: list[dict[str, Any]] = field(default_factory=list)
    defaults: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    statistics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def qualified(self) -> str:
        """Return schema and name, quoted."""
        return f"{quote_ident(self.schema)}.{quote_ident(self.name)}"

    @property
    def is_materialized(self) -> bool:
        """Return True if it is a materialized view."""
        return self.kind == "m"

    @property
    def type_words(self) -> str:
        """Return the object type as DROP and COMMENT name it."""
        return "MATERIALIZED VIEW" if self.is_materialized else "VIEW"


def load_kept(session: Session, oid: int | None) -> KeptView | None:
    """Return a view with its declarations, None if it is gone."""
    rows = session.query(_VIEW, ["bigint"], oid)
    if not rows:
        return None
    row = {**rows[0], "options": list(rows[0]["options"] or ()), "columns": list(rows[0]["columns"] or ())}
    kept = KeptView(**row)
    kept.grants = session.query(GRANTS, ["bigint"], oid)
    kept.column_comments = session.query(COLUMN_COMMENTS, ["bigint"], oid)
    kept.defaults = session.query(_DEFAULTS, ["bigint"], oid)
    kept.parts = session.query(_PARTS, ["bigint"], oid)
    kept.statistics = session.query(_STATISTICS, ["bigint"], oid) if kept.is_materialized else []
    return kept


def keep_with_dependents(session: Session, oids: Sequence[int]) -> list[KeptView]:
    """Return these views and all that are built on them, in an order of creation.

    Raises DependentObjects, with their names, if other objects depend on one of them.
    """
    parents: dict[int, set[int]] = {oid: set() for oid in oids}
    new = list(oids)
    while new:
        found = session.query(_CHILDREN, ["bigint[]"], new)
        new = []
        for row in found:
            if row["child"] not in parents:
                parents[row["child"]] = set()
                new.append(row["child"])
            parents[row["child"]].add(row["parent"])
    obstacles = session.query(_OBSTACLES, ["bigint[]"], list(parents)) if parents else []
    if obstacles:
        raise DependentObjects(
            "objects that cannot be put back depend on the views of a pipeline",
            detail=f"{', '.join(str(row['object']) for row in obstacles)}.",
            hint="Drop them first and create them again afterwards; views and materialized views are put back by themselves.",
        )
    kept = [load_kept(session, oid) for oid in TopologicalSorter(parents).static_order()]
    return [view for view in kept if view is not None]


def drop_kept(session: Session, kept: Sequence[KeptView]) -> None:
    """Drop the views, each before those that it is built on."""
    for view in reversed(kept):
        session.execute(f"DROP {view.type_words} {view.qualified}")


def put_back(session: Session, view: KeptView, *, query: str | None = None) -> None:
    """Create a view as it was, or with another query.

    A materialized view stays empty until `fill`. Nothing of the view is evaluated here: CREATE VIEW parses only, and
    indexes are built over no row, as the owner's.
    """
    options = dict(str(option).split("=", 1) for option in view.options)
    listed = ", ".join(f"{name} = {quote_literal(value).strip()}" for name, value in options.items())
    clauses = f" USING {quote_ident(view.method)}" if view.is_materialized and view.method else ""
    clauses += f" WITH ({listed})" if listed else ""
    clauses += f" TABLESPACE {quote_ident(view.tablespace)}" if view.is_materialized and view.tablespace else ""
    body = (query or view.definition).rstrip().removesuffix(";")
    ending = " WITH NO DATA" if view.is_materialized else ""
    _fitting(
        session, view, lambda: session.execute(f"CREATE {view.type_words} {view.qualified}{clauses} AS {body}{ending}")
    )
    session.execute(f"ALTER {view.type_words} {view.qualified} OWNER TO {quote_ident(view.owner)}")
    _fitting(session, view, lambda: _say_again(session, view))
    give_grants(session, view.qualified, view.grants)


def _fitting(session: Session, view: KeptView, action: Callable[[], object]) -> None:
    """Run one step of recreating a view.

    Raises DependentObjects with the view's name if the view no longer fits its relations.
    """
    try:
        with session.plpy.subtransaction():
            action()
    except session.plpy.SPIError as error:
        if sqlstate_of(error) not in _NO_LONGER_FITS:
            raise
        reason = str(error).removeprefix("embedline: ")
        raise DependentObjects(
            f"{view.type_words.lower()} {view.qualified} cannot be put back: {reason}",
            detail="Nothing is changed.",
            hint=f"Change it first, or DROP {view.type_words} {view.qualified}; and create it again afterwards.",
        ) from error


def _say_again(session: Session, view: KeptView) -> None:
    name = view.qualified
    if view.comment is not None:
        session.execute(f"COMMENT ON {view.type_words} {name} IS {quote_literal(view.comment)}")
    for comment in view.column_comments:
        session.execute(f"COMMENT ON COLUMN {name}.{comment['column']} IS {quote_literal(comment['comment'])}")
    for default in view.defaults:
        session.execute(f"ALTER VIEW {name} ALTER COLUMN {default['column']} SET DEFAULT {default['expression']}")
    for target in view.statistics:
        session.execute(
            f"ALTER MATERIALIZED VIEW {name} ALTER COLUMN {target['column']} SET STATISTICS {target['target']}"
        )
    for part in view.parts:
        session.execute(str(part["definition"]))
        if part["state"] is not None:
            words = "MATERIALIZED VIEW" if view.is_materialized else "TABLE"
            session.execute(f"ALTER {words} {name} {part['state']}")
        if part["comment"] is not None:
            words = str(part["object"]).replace("%s", name)
            session.execute(f"COMMENT ON {words} IS {quote_literal(part['comment'])}")


def fill(session: Session, kept: Sequence[KeptView]) -> None:
    """Fill the materialized views that were filled before.

    PostgreSQL runs their queries with their owners' rights.
    """
    for view in kept:
        if view.is_materialized and view.is_populated:
            session.execute(f"REFRESH MATERIALIZED VIEW {view.qualified}")


def give_grants(session: Session, view: str, grants: Sequence[dict[str, Any]]) -> None:
    """Give a recreated view exactly these grants.

    The creator's default privileges are revoked.
    """
    for grantee in {str(row["grantee"]) for row in session.query(_GRANTEES, ["text"], view)}:
        session.execute(f"REVOKE ALL ON {view} FROM {grantee}")
    for grant in grants:
        columns = f" ({grant['column']})" if grant["column"] else ""
        option = " WITH GRANT OPTION" if grant["is_grantable"] else ""
        session.execute(f"GRANT {grant['privilege_type']}{columns} ON {view} TO {grant['grantee']}{option}")
