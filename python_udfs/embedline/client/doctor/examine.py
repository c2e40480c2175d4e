"""Run the checks of `embedline doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import psycopg

from embedline.client.connection import Connection, server_message
from embedline.client.doctor.checks import (
    encoding,
    inside,
    pg_cron,
    postgresql,
    role,
    schema,
    shared_memory,
    workers,
)
from embedline.client.doctor.packages import package, pgvector, plpython
from embedline.client.doctor.server import Check, Finding, Server, Verdict

_WEIGHTS: tuple[Verdict, ...] = ("error", "warning", "note", "ok")
# What must be there before the installation, which makes these checks, too.
REQUIREMENTS: tuple[Check, ...] = (postgresql, encoding, plpython, pgvector, package)
CHECKS: tuple[Check, ...] = (
    role,
    *REQUIREMENTS,
    schema,
    pg_cron,
    workers,
    shared_memory,
    inside,
)


def examine(connection: Connection, checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """Run the checks on a connection in autocommit mode.

    Returns their findings, the gravest first.
    """
    found = run_checks(Server(connection), checks)
    return sorted(found, key=lambda finding: _WEIGHTS.index(finding.verdict))


def run_checks(server: Server, checks: Iterable[Check]) -> Iterator[Finding]:
    """Yield the findings of checks, in their order."""
    return (finding for check in checks for finding in _run(check, server))


def _run(check: Check, server: Server) -> Iterator[Finding]:
    """Yield a check's findings.

    If the database refuses an answer, the check is reported as not made, and the others go on.
    """
    try:
        yield from check(server)
    except psycopg.Error as error:
        yield Finding(check.__name__.replace("_", " "), "note", "not checked", str(server_message(error)))


def as_json(findings: Iterable[Finding]) -> str:
    """Return findings as a JSON array of objects with the fields of Finding."""
    return json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False)
