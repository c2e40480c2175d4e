"""Check the keyword index: every chunk must be in it."""

from __future__ import annotations

from embedline.catalog.values import Pipeline
from embedline.keywords.build import has_build
from embedline.keywords.entries import add_entries
from embedline.keywords.segments import Packing
from embedline.postgres.session import Session
from embedline.verify.findings import Finding

# Chunks that a repair indexes with one statement.
_PIECE = 1000


def keywords(session: Session, pipeline: Pipeline, repair: bool) -> list[Finding]:
    """Find chunks that the keyword index lacks.

    A repair indexes them, and packs segments again from which many chunks are gone. While an index is built, workers know
    what it lacks.
    """
    if pipeline.keyword is None or has_build(session, pipeline):
        return []
    findings = []
    for chunk_set in (pipeline.chunk_set, *pipeline.other_sets):
        packing = Packing(session, pipeline, chunk_set.number)
        missing = packing.missing()
        if missing:
            findings.append(
                Finding("missing_keywords", len(missing), len(missing) if repair else 0, {"chunk_id": missing[0]})
            )
        if repair:
            for start in range(0, len(missing), _PIECE):
                add_entries(session, pipeline, chunk_set.number, missing[start : start + _PIECE])
            packing.pack()
            packing.pack_outdated()
            packing.merge()
    return findings
