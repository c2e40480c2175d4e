"""Replace or recreate the views that a pipeline has, with what belongs to them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from embedline.catalog.load import load_versions
from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.core.json_values import as_mapping
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.errors import DependentObjects
from embedline.pipelines.ddl.plan import CHUNK_COLUMNS, CapturePlan
from embedline.pipelines.ddl.view import ShownVersion
from embedline.pipelines.views import (
    MAX_VIEW_COLUMNS,
    create_routing_view,
    create_version_view,
    free_name,
    shown_version,
    source_attributes,
    view_name,
    view_query,
)
from embedline.postgres.kept_views import COLUMN_COMMENTS, GRANTS, give_grants
from embedline.postgres.locks import retry_locked
from embedline.postgres.session import Session

_VIEW = """
    SELECT c.oid::regclass::text AS name, n.nspname, c.relname, pg_get_userbyid(c.relowner) AS owner,
        coalesce(c.reloptions, '{}') AS options, obj_description(c.oid, 'pg_class') AS comment,
        (SELECT a.atttypid::regtype::text FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attname = $2) AS type,
        (SELECT a.atttypmod FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attname = $2) AS typmod,
        (SELECT format_type(a.atttypid, a.atttypmod) FROM pg_attribute AS a
         WHERE a.attrelid = c.oid AND a.attname = $2) AS full_type,
        (SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_attribute AS a
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
        (SELECT p.view_attributes FROM embedline.pipeline AS p WHERE p.routing_view = c.oid) AS attributes
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = $1::oid
"""
# What DROP VIEW would refuse, or take along: views, functions, triggers, rules over the view or its row type.
_DEPENDENTS = """
    SELECT DISTINCT CASE WHEN r.oid IS NULL OR r.ev_class = $1::oid THEN pg_describe_object(d.classid, d.objid, d.objsubid)
        ELSE pg_describe_object('pg_class'::regclass, r.ev_class, 0) END AS object
    FROM pg_depend AS d
    -- All but the view's own query: a rule that somebody put on it would go with it.
    LEFT JOIN pg_rewrite AS r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
        AND (r.ev_class <> $1::oid OR r.rulename <> '_RETURN')
    WHERE ((d.refclassid = 'pg_class'::regclass AND d.refobjid = $1::oid)
            OR (d.refclassid = 'pg_type'::regclass AND d.refobjid IN (
                SELECT unnest(ARRAY[t.oid, t.typarray]) FROM pg_type AS t WHERE t.typrelid = $1::oid)))
        AND d.deptype IN ('n', 'a')
        AND NOT (d.classid = 'pg_rewrite'::regclass AND r.oid IS NULL)
    ORDER BY 1
"""


def show_version(session: Session, pipeline: Pipeline, plan: CapturePlan, source: Source) -> None:
    """Have the routing view show `pipeline.version`.

    Takes ACCESS EXCLUSIVE on the view to the end of the transaction.

    The view is replaced in place wherever it can be: what depends on it stays. If the type of the vectors changes, it
    is dropped and recreated with its owner, grants, comments and options. If something depends on it, that is
    refused.
    """
    shown = shown_version(session, pipeline)
    view = _view(session, pipeline)
    if view is None:
        create_routing_view(session, pipeline.pipeline_id, plan, source, shown)
        return
    query = view_query(session, source, plan, _layout(session, pipeline, source, view), shown)
    if (view["type"], view["typmod"]) == (_type_name(session, shown), -1):
        session.execute(f"CREATE OR REPLACE VIEW {view['name']} WITH ({_options(view)}) AS {query}")
    else:
        _make_anew(session, pipeline, view, query)


def require_swappable(session: Session, pipeline: Pipeline) -> None:
    """Raise if the routing view cannot show this version with its dependents.

    The error names the objects that depend on it.
    """
    view = _view(session, pipeline)
    shown = shown_version(session, pipeline)
    if view is None or (view["type"], view["typmod"]) == (_type_name(session, shown), -1):
        return
    dependents = [str(row["object"]) for row in session.query(_DEPENDENTS, ["bigint"], pipeline.view_oid)]
    if dependents:
        raise DependentObjects(
            f"the type of {view['name']}.{pipeline.view_columns['embedding']} changes from {view['full_type']}"
            f" to {pipeline.version.column_type}, and other objects depend on the view",
            detail=f"{', '.join(dependents)}.",
            hint="Drop them, cut over, and create them again; a version of the same column_type keeps them.",
        )


def _view(session: Session, pipeline: Pipeline) -> dict[str, Any] | None:
    rows = session.query(_VIEW, ["bigint", "name"], pipeline.view_oid, pipeline.view_columns.get("embedding"))
    return {**rows[0], "attributes": as_mapping(rows[0]["attributes"])} if rows else None


def _type_name(session: Session, shown: ShownVersion) -> str:
    # As the catalogue prints it where search_path is pinned.
    return str(session.scalar("SELECT $1::regtype::text", ["text"], shown.type_name))


def _options(view: dict[str, Any]) -> str:
    options = {str(option).split("=")[0]: str(option).split("=", 1)[1] for option in view["options"]}
    return ", ".join(
        f"{name} = {quote_literal(value)}" for name, value in {"security_invoker": "true", **options}.items()
    )


def _layout(session: Session, pipeline: Pipeline, source: Source, view: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Return the routing view's columns in order, with their source's names now.

    A renamed column keeps its old name in the view; it is known by its attribute number.
    """
    of_chunk = {pipeline.view_columns[column]: column for column in CHUNK_COLUMNS}
    attributes = source_attributes(session, source)
    names = {number: name for name, number in attributes.items()}
    known = view["attributes"] or attributes_by_name(view["columns"], attributes, of_chunk)
    layout = []
    for shown in map(str, view["columns"]):
        name = of_chunk.get(shown) or names.get(known.get(shown, 0))
        if name is None:
            raise DependentObjects(
                f"column \"{shown}\" of {view['name']} is none of the source's and none of Embedline's",
                hint="Take it out of the view, and build a view of your own on the routing view.",
            )
        layout.append((name, shown, shown in of_chunk))
    return layout


def attributes_by_name(columns: Sequence[str], attributes: dict[str, int], of_chunk: dict[str, str]) -> dict[str, int]:
    """Return the columns that a view shows which has no stored numbers.

    Such a view was made before the numbers were kept.

    Columns only ever joined a view at its end, in the order in which they joined the source. So those without a name
    in common belong together in order.
    """
    shown = [str(name) for name in columns if name not in of_chunk]
    renamed = iter([number for name, number in attributes.items() if name not in shown])
    return {name: attributes[name] if name in attributes else next(renamed, 0) for name in shown}


def await_view(session: Session, pipeline: Pipeline) -> None:
    """Wait for the lock on the routing view, and release it again.

    The steps that follow lock rows and must not wait for the view.
    """
    view = _view(session, pipeline)
    if view is None:
        return

    def take() -> None:
        with contextlib.suppress(LetGo), session.plpy.subtransaction():
            session.execute(f"ALTER VIEW {view['name']} SET ({_options(view)})")
            raise LetGo

    retry_locked(session, take, "the routing view")


class LetGo(Exception):
    """Rolls back locks that are not to be kept."""


def _make_anew(session: Session, pipeline: Pipeline, view: dict[str, Any], query: str) -> None:
    require_swappable(session, pipeline)
    name = f"{quote_ident(view['nspname'])}.{quote_ident(view['relname'])}"
    grants = session.query(GRANTS, ["bigint"], pipeline.view_oid)
    comments = session.query(COLUMN_COMMENTS, ["bigint"], pipeline.view_oid)
    session.execute(f"DROP VIEW {name}")
    session.execute(f"CREATE VIEW {name} WITH ({_options(view)}) AS {query}")
    session.execute(f"ALTER VIEW {name} OWNER TO {quote_ident(view['owner'])}")
    if view["comment"] is not None:
        session.execute(f"COMMENT ON VIEW {name} IS {quote_literal(view['comment'])}")
    for comment in comments:
        session.execute(f"COMMENT ON COLUMN {name}.{comment['column']} IS {quote_literal(comment['comment'])}")
    give_grants(session, name, grants)
    session.query(
        "UPDATE embedline.pipeline SET routing_view = $2::regclass WHERE pipeline_id = $1",
        ["bigint", "text"], pipeline.pipeline_id, name,
    )  # fmt: skip


def refresh_views(session: Session, pipeline: Pipeline, plan: CapturePlan, source: Source) -> None:
    """Have all views show the source's current columns; recreate missing ones."""
    _refresh_routing_view(session, pipeline, plan, source)
    for version in load_versions(session, pipeline.name):
        oid = version.version.view_oid
        view = session.scalar("SELECT oid::regclass::text FROM pg_class WHERE oid = $1::oid", ["bigint"], oid)
        if view is None:
            create_version_view(session, version, plan, source)
            continue
        require_no_dependents(session, oid)
        grants = session.query(GRANTS, ["bigint"], oid)
        session.execute(f"DROP VIEW {view}")
        create_version_view(session, version, plan, source)
        give_grants(session, view_name(source, plan.name, version.version.number), grants)


def require_no_dependents(session: Session, view_oid: int | None) -> None:
    """Raise, with their names, where objects depend on the view of a version."""
    dependents = [str(row["object"]) for row in session.query(_DEPENDENTS, ["bigint"], view_oid)]
    if dependents:
        raise DependentObjects(
            "other objects depend on the view of a version", detail=f"{', '.join(dependents)}.",
            hint="Build them on the routing view, which is replaced in place.",
        )  # fmt: skip


def require_droppable(session: Session, view: str, view_oid: int | None) -> None:
    """Raise if objects depend on a view that is to be dropped.

    The error names them.
    """
    dependents = [str(row["object"]) for row in session.query(_DEPENDENTS, ["bigint"], view_oid)]
    if dependents:
        raise DependentObjects(
            f"other objects depend on {view}", detail=f"{', '.join(dependents)}.",
            hint=f"Drop them first; DROP VIEW {view} CASCADE; drops them with the view.",
        )  # fmt: skip


def _refresh_routing_view(session: Session, pipeline: Pipeline, plan: CapturePlan, source: Source) -> None:
    shown = shown_version(session, pipeline)
    view = _view(session, pipeline)
    if view is None:
        create_routing_view(session, pipeline.pipeline_id, plan, source, shown)
        return
    layout = _layout(session, pipeline, source, view)
    attributes = source_attributes(session, source)
    is_typed = (view["type"], view["typmod"]) == (_type_name(session, shown), -1)
    is_renamed = any(column != name for column, name, of_chunk in layout if not of_chunk)
    if is_renamed or not is_typed:
        # CREATE OR REPLACE VIEW renames no column and changes no type: the view is recreated if nothing depends on it.
        if not is_renamed and session.query(_DEPENDENTS, ["bigint"], pipeline.view_oid):
            session.plpy.notice(
                f"{view['name']} keeps the type {view['full_type']}: other objects depend on it",
                detail="A cutover to a version of other dimensions will ask for them to be dropped and made again.",
            )
            shown = replace(shown, type_name=None)
        else:
            _make_fresh(session, pipeline, plan, source, view, shown)
            return
    taken = {name for _, name, _ in layout}
    known = {attributes[column]: name for column, name, of_chunk in layout if not of_chunk}
    added = {column: free_name(column, list(taken)) for column, number in attributes.items() if number not in known}
    if len(taken) + len(added) <= MAX_VIEW_COLUMNS:
        layout += [(column, name, False) for column, name in added.items()]
    # Also without new columns: the form of the join may be another one now.
    query = view_query(session, source, plan, layout, shown)
    session.execute(f"CREATE OR REPLACE VIEW {view['name']} WITH ({_options(view)}) AS {query}")
    _note_attributes(session, pipeline, {name: attributes[column] for column, name, of_chunk in layout if not of_chunk})


def _make_fresh(
    session: Session,
    pipeline: Pipeline,
    plan: CapturePlan,
    source: Source,
    view: dict[str, Any],
    shown: ShownVersion,
) -> None:
    """Recreate the routing view with all columns under their current names."""
    attributes = source_attributes(session, source)
    of_chunk = {pipeline.view_columns[column]: column for column in CHUNK_COLUMNS}
    names = {column: free_name(column, list(of_chunk)) for column in attributes}
    fresh = [(column, name, False) for column, name in names.items()] + [(c, n, True) for n, c in of_chunk.items()]
    _make_anew(session, pipeline, view, view_query(session, source, plan, fresh, shown))
    view_columns = pipeline.view_columns | {key.name: names[key.source_name] for key in plan.keys}
    session.query(
        "UPDATE embedline.pipeline SET view_columns = $2 WHERE pipeline_id = $1",
        ["bigint", "jsonb"], pipeline.pipeline_id, json.dumps(view_columns),
    )  # fmt: skip
    _note_attributes(session, pipeline, {name: attributes[column] for column, name in names.items()})


def _note_attributes(session: Session, pipeline: Pipeline, attributes: dict[str, int]) -> None:
    session.query(
        "UPDATE embedline.pipeline SET view_attributes = $2 WHERE pipeline_id = $1",
        ["bigint", "jsonb"], pipeline.pipeline_id, json.dumps(attributes),
    )  # fmt: skip
