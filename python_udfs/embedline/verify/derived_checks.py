"""Check derived vectors: each must be the mean of its subject's items as they are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from embedline.catalog.derived import Derived, derived_of
from embedline.catalog.values import Pipeline
from embedline.core import vectors
from embedline.documents import derived as means
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of
from embedline.verify.findings import Finding
from embedline.worker import derivation

# Subjects that are compared at once.
_PIECE = 500
# Difference of a value, for a vector of length 1, beyond which it is another: float32 differs by 1e-7.
_TOLERANCE = 1e-5


def derived(session: Session, pipeline: Pipeline, repair: bool) -> list[Finding]:
    """Find subjects with another vector than their items give.

    A repair queues them. Subjects that are queued are left out. While all are queued, or items with subjects that are
    not known yet, nothing is compared.
    """
    findings = []
    for one in derived_of(session, pipeline.name):
        try:
            with session.plpy.subtransaction():
                stale = _stale(session, one, pipeline)
        except session.plpy.SPIError as error:
            if sqlstate_of(error) in ENDING or sqlstate_of(error)[:2] == "40":
                raise
            # For example an expression that fails, or policies that hide events from their owner.
            findings.append(Finding("stale_derived", None, 0, {"derived": one.name, "error": str(error)}))
            continue
        if stale:
            if repair:
                means.put_back(session, one, stale)
            example = {"derived": one.name, "subject": stale[0]}
            findings.append(Finding("stale_derived", len(stale), len(stale) if repair else 0, example))
    return findings


def _stale(session: Session, derived: Derived, pipeline: Pipeline) -> list[str]:
    dirty, items = derived.generated("dirty"), derived.generated("items")
    number = pipeline.version.number
    waits_for_all = session.scalar(
        f"SELECT EXISTS (SELECT FROM {dirty} WHERE subjects IS NULL) OR EXISTS (SELECT FROM {items})"
        " OR to_regclass($1) IS NULL",
        ["text"],
        derived.vectors(number),
    )
    if waits_for_all:
        return []
    rows = session.query(
        f"SELECT u.subject::text AS subject FROM (SELECT a.subject FROM {derived.generated('all')}() AS a (subject)"
        f" UNION SELECT s.subject FROM {derived.generated('subject')} AS s) AS u"
        f" WHERE NOT EXISTS (SELECT FROM {dirty} AS d WHERE u.subject = ANY (d.subjects))"
    )
    subjects = [str(row["subject"]) for row in rows]
    versions = derivation.filled_versions(session, derived)
    stale = []
    for start in range(0, len(subjects), _PIECE):
        piece = subjects[start : start + _PIECE]
        computed = means.compute(session, derived, versions, piece)
        wrong = np.zeros(len(piece), dtype=bool)
        for version in versions:
            wrong |= _differs(session, derived, version, piece, computed)
        known = _known(session, derived, piece)
        wrong |= np.array([(s in known) != (count > 0) for s, count in zip(piece, computed.event_counts, strict=True)])
        stale += [piece[i] for i in np.flatnonzero(wrong)]
    return stale


def _known(session: Session, derived: Derived, subjects: list[str]) -> set[str]:
    rows = session.query(
        f"SELECT s.subject::text AS subject FROM {derived.generated('subject')} AS s"
        f" WHERE s.subject = ANY ($1::text[]::{derived.subject_type}[])",
        ["text[]"],
        subjects,
    )
    return {str(row["subject"]) for row in rows}


def _differs(
    session: Session, derived: Derived, version: Pipeline, subjects: list[str], computed: means.Computed
) -> npt.NDArray[np.bool_]:
    """Return which subjects have another vector than computed, or only one of the two."""
    number = version.version.number
    rows = session.query(
        f"SELECT s.subject::text AS subject, {vector_schema(session)}.vector_send(v.embedding) AS vector"
        f" FROM {derived.generated('subject')} AS s JOIN {derived.vectors(number)} AS v USING (subject_id)"
        f" WHERE s.subject = ANY ($1::text[]::{derived.subject_type}[])",
        ["text[]"],
        subjects,
    )
    place = {subject: i for i, subject in enumerate(subjects)}
    shape = (len(subjects), version.version.dimensions)
    stored, wanted = np.full(shape, np.nan), np.full(shape, np.nan)
    if rows:
        found = vectors.vectors_from_send([row["vector"] for row in rows], "vector")
        stored[[place[str(row["subject"])] for row in rows]] = found
    wanted[computed.positions[number]] = computed.matrices[number]
    size = np.maximum(np.abs(np.nan_to_num(wanted)).max(axis=1, keepdims=True), 1e-30)
    same = np.isclose(stored / size, wanted / size, rtol=0, atol=_TOLERANCE, equal_nan=True)
    differs: npt.NDArray[np.bool_] = ~same.all(axis=1)
    return differs
