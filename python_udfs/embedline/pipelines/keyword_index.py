"""Give a pipeline a keyword index, another one, or none."""

from __future__ import annotations

from collections.abc import Sequence

from embedline.catalog.load import load_pipeline, load_versions
from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.errors import InvalidParameter
from embedline.keywords.build import begin_build
from embedline.pipelines.ddl import keyword_tables
from embedline.pipelines.ddl.plan import CapturePlan
from embedline.pipelines.ddl.search_functions import create_search_functions, drop_keyword_functions
from embedline.pipelines.register import grant_tables
from embedline.postgres.locks import change_versions
from embedline.postgres.session import Session

# The first word may be a schema. Names are folded as an identifier is.
_FIND = """
    SELECT format('%I.%I', n.nspname, c.cfgname) AS name
    FROM pg_catalog.parse_ident($1) AS p (parts)
    JOIN pg_catalog.pg_ts_config AS c ON c.cfgname = p.parts[cardinality(p.parts)]
    JOIN pg_catalog.pg_namespace AS n ON n.oid = c.cfgnamespace
    WHERE CASE cardinality(p.parts) WHEN 1 THEN pg_catalog.pg_ts_config_is_visible(c.oid)
        WHEN 2 THEN n.nspname = p.parts[1] ELSE false END
"""
_STORE = "UPDATE embedline.pipeline SET keyword = $2 WHERE pipeline_id = $1"
_FORGET = """
    DELETE FROM embedline.keyword_build AS b USING embedline.chunk_set AS s
    WHERE s.chunk_set_id = b.chunk_set_id AND s.pipeline_id = $1
"""
_FORGET_MODES = """
    UPDATE embedline.version SET search_mode = 'vector' WHERE pipeline_id = $1 AND search_mode <> 'vector'
    RETURNING number
"""


def known_config(session: Session, name: str | None, search_path: str) -> str | None:
    """Return the qualified name of a text search configuration.

    It is looked for along the caller's search_path. Raises InvalidParameter if there is none.
    """
    if name is None:
        return None
    before = session.scalar("SELECT current_setting('search_path')")
    session.query("SELECT set_config('search_path', $1, true)", ["text"], search_path)
    try:
        rows = session.query(_FIND, ["text"], name)
    finally:
        session.query("SELECT set_config('search_path', $1, true)", ["text"], before)
    if not rows:
        raise InvalidParameter(
            f'there is no text search configuration "{name}"',
            hint="SELECT cfgname FROM pg_ts_config; lists them, such as english and simple.",
        )
    return str(rows[0]["name"])


def create_tables(session: Session, plan: CapturePlan, source: Source, numbers: Sequence[int]) -> None:
    """Create the tables of the keyword index of these chunk sets, empty."""
    for number in numbers:
        for statement in keyword_tables.table_statements(plan, number):
            session.execute(statement)
    grant_tables(session, plan, source, table_suffixes(numbers))


def table_suffixes(numbers: Sequence[int]) -> list[str]:
    """Return the suffixes of the tables of the keyword index of these chunk sets."""
    return [names.keyword_suffix(number, part) for number in numbers for part in keyword_tables.TABLES]


def drop_tables(session: Session, pipeline: Pipeline, numbers: Sequence[int]) -> None:
    """Drop the tables of the keyword index of these chunk sets.

    The functions that read them are gone already.
    """
    for suffix in table_suffixes(numbers):
        session.execute(f"DROP TABLE IF EXISTS {pipeline.generated(suffix)}")


def set_keyword(session: Session, pipeline: Pipeline, plan: CapturePlan, source: Source, config: str | None) -> None:
    """Replace the keyword index of a pipeline: by one of `config`, or by none.

    Stored chunks are indexed by workers. Writers that know the old index end first, and begin again with the new one.
    """
    change_versions(session, pipeline.pipeline_id)
    numbers = plan.chunk_sets
    for version in load_versions(session, pipeline.name):
        drop_keyword_functions(session, version)
    if pipeline.keyword is not None:
        drop_tables(session, pipeline, numbers)
    session.query(_FORGET, ["bigint"], pipeline.pipeline_id)
    session.query(_STORE, ["bigint", "text"], pipeline.pipeline_id, config)
    if session.query(_FORGET_MODES, ["bigint"], pipeline.pipeline_id):
        # Their evidence is of the index before, and the next one is not complete for a while.
        session.plpy.notice(
            f'searches of pipeline "{pipeline.name}" rank by vectors alone from now on',
            hint="Evaluate a mode with the new keywords, then SELECT embedline.use_mode(…).",
        )
    if config is None:
        return
    create_tables(session, plan, source, numbers)
    for version in load_versions(session, pipeline.name):
        create_search_functions(session, version, plan, source)
    for number in numbers:
        begin_build(session, load_pipeline(session, pipeline.name), number)
