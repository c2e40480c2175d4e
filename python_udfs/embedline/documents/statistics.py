"""Analyze a pipeline's tables once they have grown."""

from __future__ import annotations

from embedline.catalog.values import Pipeline
from embedline.postgres.session import Session

# Rows below which a plan that reads whole tables costs nothing.
_GROWN_ROWS = 2000


def analyze_grown(session: Session, pipeline: Pipeline, written: int) -> bool:
    """ANALYZE the pipeline's tables if they have grown; return True if they have.

    They have if `written` new rows make them three times the planner's estimate. Plans made while the tables were empty
    read them whole: without this the rate fell from 10,000 rows/s to 2,000 by 220,000 rows. Autovacuum comes a minute
    later. Only keys are analyzed, because a sample of vectors would be large.
    """
    if written < _GROWN_ROWS:
        return False
    known = session.scalar("SELECT reltuples FROM pg_class WHERE oid = to_regclass($1)", ["text"], pipeline.document)
    if known is None or written < 2 * known:
        return False
    session.execute(f"ANALYZE (SKIP_LOCKED) {pipeline.document} ({pipeline.key_list})")
    session.execute(f"ANALYZE (SKIP_LOCKED) {pipeline.chunk} (chunk_id, content_hash, {pipeline.key_list})")
    session.execute(f"ANALYZE (SKIP_LOCKED) {pipeline.vectors} (chunk_id)")
    return True
