"""The figures of a report.

None of them is a text, a key or a vector of a source.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta


@dataclass(frozen=True)
class Scope:
    """The database and the period of a report.

    `until` is the time of reading; `since` is the begin of the first step.
    """

    database: str
    role: str
    server_version: str
    package_version: str
    days: int
    since: datetime
    until: datetime
    step: timedelta


@dataclass(frozen=True)
class Alert:
    """A row of embedline.alert."""

    severity: str
    alert: str
    subject: str
    since: datetime
    message: str
    remedy: str | None


@dataclass(frozen=True)
class PipelineState:
    """A row of embedline.status, with the lag that batches of the last hours had."""

    pipeline: str
    source: str
    model: str
    state: str
    pending: int
    oldest_seconds: float | None
    backfill_percent: float
    dead_letters: int
    index_state: str
    index_recall: float | None
    workers_alive: int
    lag_median: float | None
    lag_p95: float | None


@dataclass(frozen=True)
class Work:
    """The work of a pipeline in one step of the period.

    The times are those of all workers together.
    """

    pipeline: str
    at: datetime
    rows: int
    embedded: int
    retried: int
    dead: int
    chunks: int
    tokens: int
    embed_seconds: float
    busy_seconds: float


@dataclass(frozen=True)
class Quality:
    """A measurement of quality; low and high are its interval of 95 %, if it has one."""

    pipeline: str
    version: int
    measured_at: datetime
    kind: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Measure:
    """A measure of a gate.

    `old` is the version that served then, `new` the one that was measured.
    """

    name: str
    old: float | None
    new: float | None
    difference: float | None
    low: float | None
    high: float | None
    verdict: str | None
    old_interval: tuple[float, float] | None
    new_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Evaluation:
    """The last gate of a version, or the last preview of a model."""

    pipeline: str
    kind: str
    version: int
    model: str
    baseline: int | None
    baseline_model: str | None
    verdict: str
    fidelity_verdict: str
    quality_verdict: str
    query_source: str
    query_count: int
    margin: float
    evaluated_at: datetime
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class Cutover:
    """A cutover or rollback of the period."""

    pipeline: str
    kind: str
    from_version: int
    to_version: int
    performed_at: datetime
    verdict: str | None
    overridden: bool
    swap_seconds: float | None


@dataclass(frozen=True)
class Usage:
    """Requests to the provider of a model in one step, which is a day at least."""

    at: datetime
    model: str
    requests: int
    tokens: int
    money: float


@dataclass(frozen=True)
class Budget:
    """A row of embedline.budget."""

    scope: str
    name: str
    period: str
    unit: str
    amount: float
    spent: float
    reserved: float
    remaining: float
    state: str
    resets_at: datetime


@dataclass(frozen=True)
class DeadLetters:
    """Dead letters of one reason.

    `version` is that of the chunks, and None for rows.
    """

    pipeline: str
    version: int | None
    stage: str
    error_code: str
    count: int
    oldest_at: datetime


@dataclass(frozen=True)
class VersionState:
    """A row of embedline.versions, with its recipe and its sizes."""

    pipeline: str
    version: int
    model: str
    state: str
    serving: bool
    dimensions: int
    column_type: str
    chunks: int
    vectors: int
    missing: int
    index_state: str
    index_recall: float | None
    ef_search: int | None
    table_bytes: int | None
    index_bytes: int | None
    gate: str | None
    rollback_until: datetime | None


@dataclass(frozen=True)
class Report:
    """All figures, of one snapshot.

    A section that the role may not read is None, and is named in `unreadable`.
    """

    scope: Scope
    alerts: tuple[Alert, ...]
    pipelines: tuple[PipelineState, ...]
    work: tuple[Work, ...]
    quality: tuple[Quality, ...]
    evaluations: tuple[Evaluation, ...] | None
    cutovers: tuple[Cutover, ...] | None
    usage: tuple[Usage, ...]
    budgets: tuple[Budget, ...]
    dead_letters: tuple[DeadLetters, ...] | None
    versions: tuple[VersionState, ...]
    unreadable: tuple[str, ...]

    def steps(self) -> list[datetime]:
        """Return the begins of all steps of the period, also of those without work."""
        return _steps(self.scope.since, self.scope.until, self.scope.step)

    def usage_steps(self) -> list[datetime]:
        """Return the begins of the steps of usage, which is kept by the day."""
        day = timedelta(days=1)
        begin = self.scope.since.replace(hour=0)
        return _steps(begin, self.scope.until, max(self.scope.step, day))


def _steps(since: datetime, until: datetime, step: timedelta) -> list[datetime]:
    return [since + step * number for number in range((until - since) // step + 1)]


def as_plain(value: object) -> str:
    """Return a value for which JSON has no form.

    Times are in ISO 8601, lengths of time in seconds.
    """
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return str(value.total_seconds())
    return str(value)
