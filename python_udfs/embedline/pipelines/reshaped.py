"""Write one pipeline's objects again over its source as it is after a change.

Columns are known by their attribute numbers, or by name where the source is another table. The functions of users'
expressions stay as they are while the types of their columns do; with another type the expression is read again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from embedline.catalog.load import load_pipeline, load_versions
from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.json_values import as_mapping
from embedline.core.sql_text import quote_ident
from embedline.errors import DependentObjects, NotFound
from embedline.pipelines.alter import replace_functions, restart_ranges
from embedline.pipelines.changed_keys import KeySwap
from embedline.pipelines.ddl.plan import CHUNK_COLUMNS, TABLES, CapturePlan, KeyColumn, SourceExpression
from embedline.pipelines.ddl.search_functions import create_search_functions
from embedline.pipelines.ddl.triggers import trigger_statements
from embedline.pipelines.expressions import StoredExpression, deparse_again
from embedline.pipelines.functions import rewrite_trigger_functions
from embedline.pipelines.inputs import PARAMETERS, Input, load_inputs, store_inputs
from embedline.pipelines.keyword_index import table_suffixes
from embedline.pipelines.plan import BEFORE_UPDATE, chunk_set_numbers, content_kind
from embedline.pipelines.register import grant_tables
from embedline.pipelines.replaced_views import attributes_by_name
from embedline.pipelines.views import (
    MAX_VIEW_COLUMNS,
    create_routing_view,
    create_version_view,
    free_name,
    shown_version,
    version_query,
    view_exists,
    view_query,
    write_serving_function,
)
from embedline.postgres.kept_views import KeptView, put_back
from embedline.postgres.session import Session

_STORED = """
    SELECT p.source_columns, p.view_attributes, p.capture, p.expression_search_path,
        jsonb_build_object('content', p.content_expression, 'filter', p.filter_expression,
            'prefix', p.document_prefix_expression, 'tenant_value', p.tenant_expression) AS expressions,
        (SELECT pg_get_userbyid(c.relowner) FROM pg_class AS c WHERE c.oid = p.source) AS owner,
        (SELECT t.tgenabled = 'A' FROM pg_trigger AS t
         WHERE t.tgrelid = p.source AND t.tgname = 'embedline_' || p.name || '_insert') AS always,
        (SELECT t.tgattr = '' FROM pg_trigger AS t
         WHERE t.tgrelid = p.source AND t.tgname = 'embedline_' || p.name || '_update') AS watches_all
    FROM embedline.pipeline AS p WHERE p.name = $1
"""
_COLUMNS = """
    SELECT a.attname, a.attnum, format_type(a.atttypid, NULL) AS type FROM pg_attribute AS a
    WHERE a.attrelid = $1::oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
_SOURCE = """
    SELECT n.nspname AS schema, c.relname AS name, pg_get_userbyid(c.relowner) AS owner, c.relkind = 'p' AS partitioned,
        EXISTS (SELECT FROM pg_subscription_rel AS s WHERE s.srrelid = c.oid) AS subscribed,
        EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhrelid = c.oid) AS is_child
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = $1::oid
"""
_STORE_SOURCE = """
    UPDATE embedline.pipeline AS p SET source = $2::oid::regclass, attributes_of = NULL, capture = $3,
        source_name = (SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class AS c
            JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = $2::oid),
        generation = generation + 1,
        source_columns = (SELECT jsonb_object_agg(a.attnum, a.attname) FROM pg_attribute AS a
            WHERE a.attrelid = $2::oid AND a.attnum > 0 AND NOT a.attisdropped),
        key_attributes = (SELECT array_agg(a.attnum ORDER BY k.position)
            FROM unnest($4::text[]) WITH ORDINALITY AS k (name, position)
            JOIN pg_attribute AS a ON a.attrelid = $2::oid AND a.attname = k.name),
        key_columns = $5, key_types = $6, view_columns = $7, view_attributes = $8
    WHERE p.name = $1
"""
_STORE_VIEW = "UPDATE embedline.pipeline SET routing_view = $2::regclass WHERE pipeline_id = $1"
_STORE_VERSION_VIEW = "UPDATE embedline.version SET view = $2::regclass WHERE version_id = $1"


@dataclass(frozen=True)
class _Shown:
    """A column of the routing view.

    It is a column of the source, by number and name, or of the chunk.
    """

    name: str
    number: int | None
    source_name: str | None
    of_chunk: str | None


@dataclass
class ReshapedPipeline:
    """One pipeline of a reshaping.

    `plan`, `source` and `columns` are those after the change.
    """

    session: Session
    pipeline: Pipeline
    stored: dict[str, Any]
    inputs: dict[str, tuple[Input, ...]]
    layout: list[_Shown]
    plan: CapturePlan = field(init=False)
    source: Source = field(init=False)
    columns: list[tuple[str, str, bool]] = field(init=False)

    @classmethod
    def of(cls, session: Session, pipeline: Pipeline, kept: Sequence[KeptView]) -> ReshapedPipeline:
        """Read the pipeline."""
        stored = session.query(_STORED, ["text"], pipeline.name)[0]
        view = next((view for view in kept if view.oid == pipeline.view_oid), None)
        layout = _routing_layout(pipeline, stored, view) if view is not None else []
        return cls(session, pipeline, stored, load_inputs(session, pipeline), layout)

    def write(self, source_oid: int, *, reads_again: bool) -> None:
        """Write everything but the views."""
        session, pipeline = self.session, self.pipeline
        self.source = source = load_source_now(session, source_oid, pipeline)
        columns = {int(row["attnum"]): row for row in session.query(_COLUMNS, ["bigint"], source_oid)}
        is_moved = source_oid != pipeline.source_oid
        swap = KeySwap.wanted(session, pipeline, source, is_moved=is_moved)
        self.plan, changed = self._plan(source, columns, swap.keys, is_moved=is_moved)
        self.columns = self._layout_now(columns, is_moved=is_moved)
        self._store(columns)
        if swap.is_needed:
            swap.begin(session)
        replace_functions(session, self.plan, source, changed)
        if swap.is_needed:
            swap.finish(session, self.plan, source)
        rewrite_trigger_functions(session, self.plan)
        for statement in trigger_statements(self.plan):
            session.execute(statement)
        self._give_to_owner()
        for version in load_versions(session, pipeline.name):
            create_search_functions(session, version, self.plan, source)
        self.pipeline = load_pipeline(session, pipeline.name)
        if reads_again or swap.is_needed or changed:
            restart_ranges(session, self.pipeline)

    def _plan(
        self, source: Source, columns: dict[int, dict[str, Any]], keys: tuple[KeyColumn, ...], *, is_moved: bool
    ) -> tuple[CapturePlan, list[str]]:
        """Return the plan for the current source, and the expressions to read again.

        The latter are named by suffix.
        """
        by_name = {str(row["attname"]): row for row in columns.values()}
        expressions: dict[str, SourceExpression] = {}
        changed = []
        for suffix, inputs in self.inputs.items():
            now = [by_name.get(i.name) if is_moved or i.number is None else columns.get(i.number) for i in inputs]
            for i, row in zip(inputs, now, strict=True):
                if row is None:
                    raise self._lacks(source, i, suffix)
            named = tuple((str(row["attname"]), str(row["type"])) for row in now if row is not None)
            if [kind for _, kind in named] == [i.type for i in inputs]:
                expressions[suffix] = SourceExpression("", named)
                continue
            text = as_mapping(self.stored["expressions"])[suffix]
            known_as = {name: i.known_as for i, (name, _) in zip(inputs, named, strict=True)}
            path = str(self.stored["expression_search_path"])
            was = StoredExpression(text, PARAMETERS[suffix], path)
            expressions[suffix] = deparse_again(self.session, source, was, known_as, is_file=self._is_file)
            changed.append(suffix)
        always = source.subscribed or bool(self.stored["always"])
        needs_rows = source.partitioned or source.subscribed or source.is_child or always
        same = self.stored["capture"] if not is_moved or self.stored["always"] is None else "statement"
        return CapturePlan(
            name=self.pipeline.name, source=source.qualified, keys=keys, content=expressions["content"],
            filter=expressions.get("filter"), capture="row" if needs_rows else str(same), always=always,
            watch_all=bool(self.stored["watches_all"]) or bool(self.session.scalar(BEFORE_UPDATE, ["bigint"], source.oid)),
            prefix=expressions.get("prefix"), tenant=expressions.get("tenant_value"),
            chunk_sets=chunk_set_numbers(self.pipeline), partitioned=source.partitioned, is_file=self._is_file,
        ), changed  # fmt: skip

    @property
    def _is_file(self) -> bool:
        return content_kind(self.pipeline).is_file

    def _lacks(self, source: Source, column: Input, suffix: str) -> DependentObjects:
        parameter, name = PARAMETERS[suffix], self.pipeline.name
        return DependentObjects(
            f'{source.qualified} has no column "{column.name}", which {parameter} of pipeline "{name}" reads',
            hint=f"SELECT embedline.alter_pipeline('{name}', {parameter} => '...'); first, without that column.",
        )

    def _layout_now(self, columns: dict[int, dict[str, Any]], *, is_moved: bool) -> list[tuple[str, str, bool]]:
        """Return (column, name in the routing view, whether it is of the chunk).

        Columns that are gone are left out.
        """
        by_name = {str(row["attname"]): row for row in columns.values()}
        layout = []
        for shown in self.layout:
            if shown.of_chunk is not None:
                layout.append((shown.of_chunk, shown.name, True))
                continue
            row = by_name.get(shown.source_name or "") if is_moved else columns.get(shown.number or 0)
            if row is not None:
                layout.append((str(row["attname"]), shown.name, False))
        taken = [name for _, name, _ in layout]
        there = {column for column, _, of_chunk in layout if not of_chunk}
        if layout and len(taken) + len(set(by_name) - there) <= MAX_VIEW_COLUMNS:
            for column in by_name:
                if column not in there:
                    name = free_name(column, taken)
                    taken.append(name)
                    layout.append((column, name, False))
        return layout

    def _store(self, columns: dict[int, dict[str, Any]]) -> None:
        plan, source = self.plan, self.source
        numbers = {str(row["attname"]): number for number, row in columns.items()}
        shown = {column: name for column, name, of_chunk in self.columns if not of_chunk}
        view_columns = {column: self.pipeline.view_columns[column] for column in CHUNK_COLUMNS}
        view_columns |= {key.name: shown.get(key.source_name, key.source_name) for key in plan.keys}
        attributes = {name: numbers[column] for column, name in shown.items()}
        self.session.query(
            _STORE_SOURCE, ["text", "bigint", "text", "text[]", "text[]", "text[]", "jsonb", "jsonb"],
            plan.name, source.oid, plan.capture, [key.source_name for key in plan.keys],
            [key.name for key in plan.keys], [key.type for key in plan.keys], json.dumps(view_columns), json.dumps(attributes),
        )  # fmt: skip
        store_inputs(self.session, plan)
        self.session.query("SELECT embedline._resolve_attributes()")

    def put_routing_view_back(self, view: KeptView) -> None:
        """Put the routing view back over the source as it is now."""
        shown = shown_version(self.session, self.pipeline)
        query = view_query(self.session, self.source, self.plan, self.columns, shown)
        self._put_view_back(view, query)
        self.session.query(_STORE_VIEW, ["bigint", "text"], self.pipeline.pipeline_id, view.qualified)

    def put_version_view_back(self, view: KeptView, version: Pipeline) -> None:
        """Put the view over one version back."""
        query = version_query(self.session, version, self.plan, self.source, view.qualified)
        self._put_view_back(view, query)
        self.session.query(_STORE_VERSION_VIEW, ["bigint", "text"], version.version.version_id, view.qualified)

    def _put_view_back(self, view: KeptView, query: str) -> None:
        if view.owner == self.stored["owner"]:
            view.owner = self.source.owner
        put_back(self.session, view, query=query)

    def create_missing_views(self) -> None:
        """Create views that went with a CASCADE, and the serving function."""
        session, plan, source = self.session, self.plan, self.source
        pipeline = load_pipeline(session, self.pipeline.name)
        if pipeline.view_oid is None or not view_exists(session, pipeline.view_oid):
            shown = shown_version(session, pipeline)
            create_routing_view(session, pipeline.pipeline_id, plan, source, shown)
        for version in load_versions(session, pipeline.name):
            if version.version.view_oid is None or not view_exists(session, version.version.view_oid):
                create_version_view(session, version, plan, source)
        write_serving_function(session, plan, pipeline.version.number)

    def _give_to_owner(self) -> None:
        """Give the source's owner the rights that the views need.

        They are taken from the owner of another table.
        """
        plan, pipeline = self.plan, self.pipeline
        suffixes = [names.chunk_suffix(number) for number in plan.chunk_sets]
        suffixes += [names.version_suffix(number) for _, number, _ in pipeline.versions]
        suffixes += table_suffixes(plan.chunk_sets) if pipeline.keyword else []
        grant_tables(self.session, plan, self.source, suffixes)
        before = self.stored["owner"]
        if before is None or before == self.source.owner:
            return
        tables = ", ".join(plan.generated(suffix) for suffix in (*suffixes, *TABLES))
        self.session.execute(f"REVOKE ALL ON {tables} FROM {quote_ident(before)}")
        for version in load_versions(self.session, pipeline.name):
            self.session.execute(f"REVOKE ALL ON {version.exact} FROM {quote_ident(before)}")


def _routing_layout(pipeline: Pipeline, stored: dict[str, Any], view: KeptView) -> list[_Shown]:
    names = {int(k): str(v) for k, v in as_mapping(stored["source_columns"]).items()}
    by_name = {name: number for number, name in names.items()}
    of_chunk = {pipeline.view_columns[column]: column for column in CHUNK_COLUMNS}
    known = {str(k): int(v) for k, v in as_mapping(stored["view_attributes"]).items()}
    known = known or attributes_by_name(view.columns, by_name, of_chunk)
    return [_Shown(name, known.get(name), names.get(known.get(name, 0)), of_chunk.get(name)) for name in view.columns]


def load_source_now(session: Session, oid: int, pipeline: Pipeline) -> Source:
    """Return the table of that number as a source; raise NotFound where it is gone."""
    rows = session.query(_SOURCE, ["bigint"], oid)
    if not rows:
        raise NotFound(
            f'the source of pipeline "{pipeline.name}" is gone',
            hint=f"SELECT embedline.move_pipeline('{pipeline.name}', 'another_table'); or"
            f" SELECT embedline.drop_pipeline('{pipeline.name}');",
        )
    row = rows[0]
    return Source(
        oid=oid, schema=row["schema"], name=row["name"], owner=row["owner"], partitioned=row["partitioned"],
        subscribed=row["subscribed"], is_child=row["is_child"],
    )  # fmt: skip
