"""Verify a pipeline: compare stored data with the source, and repair it.

Each check is one statement, hence one snapshot. An application's write and its queue entry are seen together or not at
all, and a row in flight is still queued. Repairs queue rows and leave the embedding to the workers. Only data that no
row needs any more are deleted here. No statement waits for a row lock of an application.
"""

from __future__ import annotations

import json
from typing import Any

from embedline.catalog.load import load_pipeline
from embedline.catalog.values import Pipeline
from embedline.core.processes import prepare_environment
from embedline.errors import InvalidParameter
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import hold_source
from embedline.postgres.session import Session
from embedline.queue import chunk_queue
from embedline.verify import model_drift
from embedline.verify.checks import (
    against_source,
    capture_off,
    chunks,
    dead_letters,
    gone,
    hidden,
    other_versions,
    require_source,
)
from embedline.verify.derived_checks import derived
from embedline.verify.findings import Finding, merge, note
from embedline.verify.keyword_checks import keywords
from embedline.verify.vector_checks import foreign, unreachable, vectors


@entry_point
def verify(session: Session, pipeline_name: str, repair: bool | None, sample: int | None) -> list[dict[str, Any]]:
    """Check a pipeline, repair it if asked to, and record the result.

    Returns the findings.
    """
    if sample is None or not 0 <= sample <= model_drift.MAX_SAMPLE:
        raise InvalidParameter(
            f"sample must be between 0 and {model_drift.MAX_SAMPLE}",
            hint="sample => 0 checks without asking the model.",
        )
    findings = verify_pipeline(session, load_pipeline(session, pipeline_name), bool(repair), sample)
    return [
        {
            "finding": finding.name,
            "count": finding.count,
            "repaired": finding.repaired,
            "example": None if finding.example is None else json.dumps(finding.example),
        }
        for finding in findings
    ]


def verify_pipeline(session: Session, pipeline: Pipeline, repair: bool, sample: int) -> list[Finding]:
    """Run all checks of a pipeline and write them into embedline.verification.

    Returns the checks that found something. The model is checked first, with no table locked. Then come checks that
    only read, then those that take row locks. The row locks and the reader's lock on the source last to the
    transaction's end.
    """
    require_source(session, pipeline)
    prepare_environment()
    found = model_drift.examine(session, pipeline, sample) if sample else None
    hold_source(session, pipeline.source_oid)
    asked, pipeline = pipeline, load_pipeline(session, pipeline.name)
    if pipeline.version.version_id != asked.version.version_id:
        # The pipeline was cut over meanwhile.
        found = None
    findings = capture_off(session, pipeline)
    findings += against_source(session, pipeline, repair)
    findings += vectors(session, pipeline, repair)
    if not chunk_queue.is_behind(session, pipeline):
        findings += chunks(session, pipeline, repair)
    findings += other_versions(session, pipeline, repair)
    findings += gone(session, pipeline, repair)
    findings += hidden(session, pipeline, repair)
    findings += dead_letters(session, pipeline, repair)
    if found is not None and found.is_finding:
        findings.append(foreign(session, pipeline, found, repair))
    findings += unreachable(session, pipeline, repair)
    findings += keywords(session, pipeline, repair)
    findings += derived(session, pipeline, repair)
    merged = merge(findings)
    note(session, pipeline, repair, merged)
    return merged


def note_failure(session: Session, pipeline_name: str, message: str) -> None:
    """Record in embedline.verification that a pipeline could not be verified."""
    session.query(
        "INSERT INTO embedline.verification (pipeline_id, finding_count, repaired_count, error)"
        " SELECT p.pipeline_id, 0, 0, $2 FROM embedline.pipeline AS p WHERE p.name = $1",
        ["text", "text"],
        pipeline_name,
        message,
    )
