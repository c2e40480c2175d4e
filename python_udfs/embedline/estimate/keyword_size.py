"""Estimate the size of a keyword index."""

from __future__ import annotations

from embedline.catalog.load import load_pipeline
from embedline.estimate.figures import MEGABYTE, Figure
from embedline.estimate.measure import Measured
from embedline.estimate.plan import Plan
from embedline.postgres.session import Session

# Of each different word of a chunk: 1,000,000 chunks of 66 such words took 260 bytes each, with all tables and their indexes.
_BYTES_PER_WORD = 4.0
_WORDS = "SELECT avg(length(to_tsvector($1::regconfig, left(t, 100000)))) FROM unnest($2::text[]) AS t"


def keyword_figures(session: Session, plan: Plan, measured: Measured) -> list[Figure]:
    """Return the size of the keyword index, or of one for English if there is none."""
    config = None if plan.pipeline is None else load_pipeline(session, plan.pipeline).keyword
    if not measured.texts:
        return []
    words = float(session.scalar(_WORDS, ["text", "text[]"], config or "pg_catalog.english", measured.texts) or 0)
    size = measured.sample.total(measured.chunks).times(words * _BYTES_PER_WORD / MEGABYTE)
    state = f"of {config}" if config else "if there were one, keyword => 'english'"
    return [Figure("keyword index", size, "MB", f"{state}: {words:.0f} different words a chunk; once it is packed", 1)]
