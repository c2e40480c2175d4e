"""Define the finding of a check, and merge findings of several ranges."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from embedline.catalog.values import Pipeline
from embedline.postgres.session import Session


@dataclass(frozen=True)
class Finding:
    """The finding of one check.

    `count` is None if the check could not be made, and `example` then holds the reason.
    """

    name: str
    count: int | None
    repaired: int = 0
    example: Mapping[str, Any] | None = None


def make_finding(row: Mapping[str, Any]) -> Finding:
    example = row["example"]
    return Finding(
        str(row["finding"]),
        int(row["count"]),
        int(row.get("repaired") or 0),
        json.loads(example) if isinstance(example, str) else example,
    )


def merge(findings: Sequence[Finding]) -> list[Finding]:
    """Add up the findings of several checks under one name."""
    merged: dict[str, Finding] = {}
    for finding in findings:
        first = merged.setdefault(finding.name, finding)
        if first is not finding:
            count = (first.count or 0) + (finding.count or 0)
            merged[finding.name] = replace(first, count=count, repaired=first.repaired + finding.repaired)
    return list(merged.values())


def note(session: Session, pipeline: Pipeline, repair: bool, findings: Sequence[Finding]) -> None:
    amiss = [finding for finding in findings if finding.name != "pending"]
    session.query(
        "INSERT INTO embedline.verification (pipeline_id, repair, finding_count, repaired_count, findings)"
        " VALUES ($1, $2, $3, $4, $5)",
        ["bigint", "boolean", "bigint", "bigint", "jsonb"],
        pipeline.pipeline_id,
        repair,
        sum(finding.count or 0 for finding in amiss),
        sum(finding.repaired for finding in amiss),
        json.dumps([asdict(finding) for finding in findings]),
    )
