"""Take derived vectors along when their pipeline goes over to another version."""

from __future__ import annotations

import time
from collections.abc import Callable

from embedline.catalog.derived import Derived, derived_of
from embedline.catalog.values import Pipeline
from embedline.documents import derived as means
from embedline.errors import NotReady
from embedline.pipelines import derived as objects
from embedline.postgres.session import Session
from embedline.worker import derivation

# Subjects that are computed at once.
_PIECE = 500


def require_derived(session: Session, target: Pipeline, seconds: float) -> None:
    """Raise NotReady unless the version has its derived vectors.

    Computes what lacks, for a time. Workers fill a version's derived vectors once its own are complete.
    """
    left = fill(session, target, seconds)
    if left:
        raise NotReady(
            f'version {target.version.number} of pipeline "{target.name}" lacks derived vectors of "{left[0]}"',
            hint="Run it again when workers have computed them: SELECT * FROM embedline.derived_status;",
        )


def fill(session: Session, target: Pipeline, seconds: float) -> list[str]:
    """Compute derived vectors that a version lacks, for a time.

    Return the names of those that lack more.
    """
    deadline = time.monotonic() + seconds
    return [
        derived.name for derived in derived_of(session, target.name) if not _fill(session, derived, target, deadline)
    ]


def _fill(session: Session, derived: Derived, target: Pipeline, deadline: float) -> bool:
    while not derivation.lock_alone(session, derived):
        if time.monotonic() > deadline:
            return False
        session.execute("SELECT pg_sleep(0.01)")
    if not objects.has_version(session, derived, target.version.number):
        derivation.add_version(session, derived, target)
    last = 0
    while lacking := _lacking(session, derived, target, last):
        if time.monotonic() > deadline:
            return False
        last = max(lacking.values())
        means.recompute(session, derived, derivation.filled_versions(session, derived), list(lacking))
    return True


def _lacking(session: Session, derived: Derived, target: Pipeline, after: int) -> dict[str, int]:
    """Return subjects that have no vector of a version, in the order of their ids."""
    rows = session.query(
        f"SELECT s.subject::text AS subject, s.subject_id FROM {derived.generated('subject')} AS s"
        f" WHERE s.subject_id > $1 AND NOT EXISTS (SELECT FROM {derived.vectors(target.version.number)} AS v"
        " WHERE v.subject_id = s.subject_id) ORDER BY s.subject_id LIMIT $2",
        ["bigint", "integer"],
        after,
        _PIECE,
    )
    return {str(row["subject"]): int(row["subject_id"]) for row in rows}


def showing(session: Session, target: Pipeline, show: Callable[[], None]) -> Callable[[], None]:
    """Return the work that also has the views of derived vectors show a version."""
    replaced = [
        statement
        for derived in derived_of(session, target.name)
        for statement in objects.show_statements(session, derived, target)
    ]

    def show_all() -> None:
        show()
        for statement in replaced:
            session.execute(statement)

    return show_all
