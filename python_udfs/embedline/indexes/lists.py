"""Decide how many lists of an IVFFlat index a search probes, and when to rebuild.

k-means places the centres when the index is built; they do not move afterwards. A new vector joins the list of the nearest
centre. So lists that were built on few vectors grow long, and those built on other vectors answer badly.
"""

from __future__ import annotations

from dataclasses import replace

from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.ivfflat import MAX_LISTS
from embedline.core.sql_text import quote_ident
from embedline.indexes.definitions import VectorIndex, index_state, own_index, wanted_lists
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session

# Share of the lists probed until the index is measured.
_UNMEASURED_SHARE = 0.1
# Rows wanted for which the measured probes are enough, and the power with which more rows need more. Of 1,000 lists of
# package summaries 200 gave recall@10 0.982; recall@100 was 0.961 with 257.
_MEASURED_LIMIT, _GROWTH = 40, 0.5
# pgvector's default, of an index that was made by hand.
_DEFAULT_LISTS = 100
# Lists are built again once there are so many times the vectors that they were built on, and at least so many vectors. So their
# number keeps to pgvector's rule. Fewer vectors are read whole in some milliseconds.
_GROWN, _FEWEST_ROWS = 2, 10_000
# Recall@10 lost with the probes of the first measurement, from which they are built again. The mean of 100 queries has a
# standard error of about 0.01.
_LOST_RECALL = 0.05
# Stands in the name of the index that is built to take the place of another.
_NEXT = "next"
_NOTE = """
    INSERT INTO embedline.index_reach AS r (version_id, index_node, built_rows) VALUES ($1, $2::oid, $3)
    ON CONFLICT (version_id) DO UPDATE SET index_node = excluded.index_node, built_rows = excluded.built_rows,
        probes = CASE WHEN r.index_node IS NULL THEN r.probes END,
        wide_probes = CASE WHEN r.index_node IS NULL THEN r.wide_probes END,
        built_probes = CASE WHEN r.index_node IS NULL THEN r.built_probes END,
        built_recall = CASE WHEN r.index_node IS NULL THEN r.built_recall END,
        kept_recall = CASE WHEN r.index_node IS NULL THEN r.kept_recall END
"""
_BUILT = """
    SELECT built_rows, built_probes, built_recall, kept_recall FROM embedline.index_reach
    WHERE version_id = $1 AND built_rows IS NOT NULL
"""
_LISTS = """
    SELECT coalesce((
        SELECT o.option_value::integer FROM pg_options_to_table(c.reloptions) AS o WHERE o.option_name = 'lists'), $2)
    FROM pg_class AS c WHERE c.relname = $1 AND c.relnamespace = 'embedline_data'::regnamespace
"""


def list_count(session: Session, index: VectorIndex) -> int:
    """Return the number of lists of an IVFFlat index."""
    return int(session.scalar(_LISTS, ["name", "integer"], index.name, _DEFAULT_LISTS) or _DEFAULT_LISTS)


def probes(session: Session, index: VectorIndex, measured: int | None, limit: int) -> int:
    """Return ivfflat.probes for the nearest `limit` rows."""
    if measured is None:
        measured = max(round(_UNMEASURED_SHARE * list_count(session, index)), 1)
    more = max(limit / _MEASURED_LIMIT, 1.0) ** _GROWTH
    return int(min(round(measured * more), MAX_LISTS))


def row_count(session: Session, pipeline: Pipeline) -> int:
    """Return the number of vectors of the version, as the server's statistics have it."""
    known = session.scalar("SELECT reltuples FROM pg_class WHERE oid = to_regclass($1)", ["text"], pipeline.vectors)
    if known is not None and known > 0:
        return int(known)
    return int(session.scalar(f"SELECT count(*) FROM {pipeline.vectors}"))


def rebuild_statements(session: Session, pipeline: Pipeline, index: VectorIndex) -> str:
    """Return the statements that build the lists again for the vectors of now."""
    wanted = wanted_lists(pipeline, row_count(session, pipeline))
    return f"ALTER INDEX {index.qualified} SET (lists = {wanted}); REINDEX INDEX CONCURRENTLY {index.qualified};"


def note_build(session: Session, pipeline: Pipeline) -> None:
    """Keep on how many vectors the version's lists were built.

    Each build gives the index another file. What was measured with the lists before it is forgotten.
    """
    own = own_index(pipeline, vector_schema(session))
    if index_state(session, own) != "valid":
        return
    node = session.scalar("SELECT pg_relation_filenode(to_regclass($1))::bigint", ["text"], own.qualified)
    reach = pipeline.version.reach
    if node is not None and (reach is None or reach.index_node != node):
        rows = row_count(session, pipeline)
        session.query(_NOTE, ["bigint", "bigint", "bigint"], pipeline.version.version_id, node, rows)


def drift(session: Session, pipeline: Pipeline) -> str | None:
    """Return why the version's lists should be built again; None if they should not."""
    noted = session.query(_BUILT, ["bigint"], pipeline.version.version_id)
    if not noted:
        return None
    built, now = noted[0], row_count(session, pipeline)
    if now >= max(_GROWN * int(built["built_rows"]), _FEWEST_ROWS):
        return f"the lists were built on {built['built_rows']:,} vectors, and there are {now:,}"
    if built["kept_recall"] is not None and built["kept_recall"] < built["built_recall"] - _LOST_RECALL:
        return (
            f"recall@10 with {built['built_probes']} probes was {built['built_recall']:.3f} when the lists were built,"
            f" and is {built['kept_recall']:.3f}"
        )
    return None


def successor(pipeline: Pipeline, own: VectorIndex) -> VectorIndex:
    """Return the index that is built to take the place of the version's own."""
    name = names.vector_index(pipeline.name, pipeline.version.number, _NEXT)
    return replace(own, name=name, precision=_NEXT)


def swap(session: Session, pipeline: Pipeline, own: VectorIndex, following: VectorIndex) -> None:
    """Drop the version's own index and give its name to the one built after it.

    Takes ACCESS EXCLUSIVE on the version's table for an instant, and waits 0.1 s for it at most: searches queue behind it.
    """
    session.execute("SET LOCAL lock_timeout = '100ms'")
    session.execute(f"DROP INDEX {own.qualified}")
    session.execute(f"ALTER INDEX {following.qualified} RENAME TO {quote_ident(own.name)}")
    note_build(session, pipeline)
