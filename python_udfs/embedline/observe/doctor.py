"""Examine the server and what is stored: the part of `embedline doctor` inside.

The client checks what comes before the installation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from embedline.observe import server_checks, vector_checks
from embedline.observe.findings import SEVERITIES, Check, Finding
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of

_ALERTS = "SELECT severity, alert, subject, message, remedy FROM embedline._alert_conditions()"


def alerts(session: Session) -> Iterator[Finding]:
    """Take over what is wrong now."""
    for row in session.query(_ALERTS):
        yield Finding(row["severity"], row["alert"], row["subject"], row["message"], row["remedy"])


CHECKS: tuple[Check, ...] = (
    alerts,
    server_checks.settings,
    server_checks.worker_roles,
    server_checks.publications,
    server_checks.embedding_packages,
    server_checks.model_host,
    vector_checks.stored_vectors,
    vector_checks.mixed_fingerprints,
    vector_checks.measured_recall,
    vector_checks.unused_indexes,
)


@entry_point
def doctor(session: Session) -> list[dict[str, Any]]:
    """Return the findings of all checks, the gravest first."""
    found = [finding for check in CHECKS for finding in _run(session, check)]
    return [asdict(finding) for finding in sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))]


def _run(session: Session, check: Check) -> list[Finding]:
    """Run a check; report one that fails, and go on."""
    try:
        with session.plpy.subtransaction():
            return list(check(session))
    except session.plpy.SPIError as error:
        if sqlstate_of(error) in ENDING:
            raise
        return [Finding("note", "not_checked", check.__name__, str(error))]
