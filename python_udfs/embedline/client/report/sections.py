"""Put work in words: alerts, freshness, throughput, spending, dead letters, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TypeVar

from embedline.client.report import words
from embedline.client.report.blocks import (
    Cell,
    Column,
    Figure,
    Group,
    Section,
    Table,
    Tile,
    Tone,
    text_cells,
    verdict_cell,
)
from embedline.client.report.charts import Caption, bar_chart, meter
from embedline.client.report.figures import Budget, PipelineState, Report, Usage, VersionState, Work

# Rows that a table shows at most, and pipelines or models that have a chart: a page of a thousand is read by no person.
MOST_ROWS, MOST_CHARTS = 50, 6
_TONES: dict[str, Tone] = {"critical": "bad", "warning": "warn", "note": "plain"}
_INDEX_TONES: dict[str, Tone] = {"valid": "good", "invalid": "bad", "none": "plain"}

_Row = TypeVar("_Row")


def tiles(report: Report) -> list[Tile]:
    """Return the figures of the page's head."""
    grave = sum(alert.severity != "note" for alert in report.alerts)
    waiting = sum(state.pending for state in report.pipelines)
    dead = sum(state.dead_letters for state in report.pipelines)
    money = sum(usage.money for usage in report.usage)
    tokens = sum(usage.tokens for usage in report.usage)
    worst: Tone = _TONES[report.alerts[0].severity] if grave else "good"
    spent = ("Money spent", words.amount(money, "money")) if money else ("Tokens metered", words.compact(tokens))
    return [
        Tile("Alerts", words.count(grave), worst),
        Tile("Pipelines", words.count(len(report.pipelines))),
        Tile("Rows that wait", words.count(waiting)),
        Tile("Dead letters", words.count(dead), "warn" if dead else "plain"),
        Tile("Chunks embedded", words.compact(sum(work.chunks for work in report.work))),
        Tile(*spent),
    ]


def attention(report: Report) -> Section:
    """Return the alerts, each with the statement that helps."""
    title = "What needs attention"
    if not report.alerts:
        return Section("attention", title, ["Nothing is wrong."])
    columns = [Column(name) for name in ("Severity", "Alert", "Subject", "Since", "What is wrong", "What helps")]
    table = _table(
        "Alerts, the gravest first",
        columns,
        report.alerts,
        lambda alert: (
            Cell(alert.severity, "badge", _TONES[alert.severity]),
            *text_cells(alert.alert, alert.subject, words.moment(alert.since), alert.message),
            Cell(alert.remedy, "code") if alert.remedy else Cell(words.ABSENT),
        ),
    )
    return Section("attention", title, tables=[table])


def freshness(report: Report) -> Section:
    """Return each pipeline: what waits, how far the vectors are behind, its index."""
    title = "Pipelines and freshness"
    if not report.pipelines:
        return Section("pipelines", title, ["There is no pipeline yet."])
    # Those that have something to say come first, because a long table is cut.
    states = sorted(report.pipelines, key=lambda state: (-state.pending, -state.dead_letters, state.pipeline))
    names = ("Pipeline", "Source", "Model", "State", "Backfill", "Index")
    numbers = ("Waiting", "Oldest waits", "Lag p50", "Lag p95", "Dead letters")
    table = _table("Pipelines", [*map(Column, names), *(Column(name, True) for name in numbers)], states, _pipeline)
    workers = words.plural(max(state.workers_alive for state in states), "worker")
    sentences = [
        f"{workers} alive. Lag is the time from a change to its vector, of the batches that are kept"
        " (setting batch_retention_hours)."
    ]
    return Section("pipelines", title, sentences, [table])


def _pipeline(state: PipelineState) -> Sequence[Cell]:
    is_fine = state.state == "active"
    return (
        *text_cells(state.pipeline, state.source, state.model),
        Cell(state.state, "badge", "good" if is_fine else "warn" if state.state == "paused" else "bad"),
        Cell(words.percent(state.backfill_percent)),
        Cell(state.index_state, "badge", _INDEX_TONES.get(state.index_state, "warn")),
        *text_cells(
            words.count(state.pending),
            words.seconds(state.oldest_seconds),
            words.seconds(state.lag_median),
            words.seconds(state.lag_p95),
            words.count(state.dead_letters),
        ),
    )


def throughput(report: Report) -> Section:
    """Return the chunks of each step of the busiest pipelines, and the sums of all."""
    title = "Throughput over time"
    if not report.work:
        return Section("throughput", title, ["Nothing was embedded in this period."])
    by_pipeline: dict[str, list[Work]] = {}
    for work in report.work:
        by_pipeline.setdefault(work.pipeline, []).append(work)
    busiest = sorted(by_pipeline.items(), key=lambda item: (-sum(work.chunks for work in item[1]), item[0]))
    numbers = (
        "Rows",
        "Embedded",
        "Tried again",
        "Given up",
        "Chunks",
        "Tokens",
        "Chunks a second",
        "Time at the provider",
    )
    table = _table(
        "Work of the period by pipeline, the busiest first",
        [Column("Pipeline"), *(Column(name, True) for name in numbers)],
        busiest,
        lambda item: _work(*item),
    )  # fmt: skip
    sentences = [_each_step(report.scope.step, "Chunks"), *_only_busiest(len(busiest), "pipelines")]
    figures = [
        _throughput_of(report, name, works, number) for number, (name, works) in enumerate(busiest[:MOST_CHARTS])
    ]
    return Section("throughput", title, sentences, [table], figures)


def _work(pipeline: str, works: Iterable[Work]) -> Sequence[Cell]:
    sums = [
        sum(column)
        for column in zip(*((w.rows, w.embedded, w.retried, w.dead, w.chunks, w.tokens) for w in works), strict=True)
    ]
    chunks = sums[4]
    embedding, busy = sum(w.embed_seconds for w in works), sum(w.busy_seconds for w in works)
    rate = f"{chunks / busy:,.0f}" if busy else words.ABSENT
    share = words.percent(round(100 * embedding / busy)) if busy else words.ABSENT
    return text_cells(pipeline, *map(words.count, sums), rate, share)


def _throughput_of(report: Report, pipeline: str, works: Iterable[Work], number: int) -> Figure:
    chunks = {work.at: work.chunks for work in works}
    steps = report.steps()
    labels = [words.step(at, report.scope.step) for at in steps]
    values = [chunks.get(at, 0) for at in steps]
    most = max(range(len(values)), key=values.__getitem__)
    caption = Caption(
        f"throughput-{number}",
        f"Chunks of {pipeline}",
        f"{words.count(sum(values))} chunks in all; the most, {words.count(values[most])}, from {labels[most]}.",
    )
    rows = [text_cells(label, words.count(value)) for label, value in zip(labels, values, strict=True)]
    table = Table(caption.title, [Column("From"), Column("Chunks", True)], rows)
    return Figure(caption.title, bar_chart(caption, labels, values), table)


def spending(report: Report) -> Section:
    """Return the budgets, and the money or tokens of each step by model."""
    title = "Spend against budget"
    sentences = ["There is no budget: SELECT embedline.set_budget(…) sets one."] if not report.budgets else []
    tables = [_budgets(report.budgets)] if report.budgets else []
    groups = [_by_model(report)] if report.usage else []
    if not groups:
        sentences.append("No request to a provider was metered in this period.")
    return Section("spending", title, sentences, tables, groups=groups)


def _by_model(report: Report) -> Group:
    by_model: dict[str, list[Usage]] = {}
    for usage in report.usage:
        by_model.setdefault(usage.model, []).append(usage)
    dearest = sorted(
        by_model.items(), key=lambda item: (-sum(u.money for u in item[1]), -sum(u.tokens for u in item[1]), item[0])
    )
    numbers = [Column(name, True) for name in ("Requests", "Tokens", "Money")]
    table = _table(
        "Use of the period by model, the dearest first",
        [Column("Model"), *numbers],
        dearest,
        lambda item: text_cells(
            item[0],
            words.count(sum(usage.requests for usage in item[1])),
            words.count(sum(usage.tokens for usage in item[1])),
            words.amount(sum(usage.money for usage in item[1]), "money"),
        ),
    )
    sentences = ["Queries of searches are not metered.", *_only_busiest(len(dearest), "models")]
    figures = [
        _spending_of(report, name, usages, number) for number, (name, usages) in enumerate(dearest[:MOST_CHARTS])
    ]
    return Group("Use by model", sentences, [table], figures)


def _budgets(budgets: Sequence[Budget]) -> Table:
    columns = [Column(name) for name in ("Budget", "State", "Used")]
    columns += [Column(name, True) for name in ("Spent", "Reserved", "Left", "Amount")]
    numbered = list(enumerate(budgets))
    return _table(
        "Budgets, the scarcest first", [*columns, Column("Begins again")], numbered, lambda item: _budget(*item)
    )


def _budget(number: int, budget: Budget) -> Sequence[Cell]:
    share = 100 * budget.spent / budget.amount if budget.amount else 100.0
    told = f"{share:.0f} % of the {budget.unit} of this {budget.period}"
    caption = Caption(f"budget-{number}", f"Budget of {budget.scope} {budget.name}", told)
    return (
        Cell(f"{budget.scope} {budget.name}, {budget.unit} a {budget.period}"),
        Cell(budget.state, "badge", "good" if budget.state == "open" else "bad"),
        Cell(f"{share:.0f} %", chart=meter(caption, budget.spent, budget.reserved, budget.amount)),
        *text_cells(
            *(
                words.amount(value, budget.unit)
                for value in (budget.spent, budget.reserved, budget.remaining, budget.amount)
            ),
            words.moment(budget.resets_at),
        ),
    )


def _spending_of(report: Report, model: str, usages: Sequence[Usage], number: int) -> Figure:
    unit = "money" if any(usage.money for usage in usages) else "tokens"
    spent = {usage.at: usage.money if unit == "money" else float(usage.tokens) for usage in usages}
    steps = report.usage_steps()
    labels = [words.step(at, timedelta(days=1)) for at in steps]
    values = [spent.get(at, 0.0) for at in steps]
    caption = Caption(
        f"spending-{number}",
        f"{unit.capitalize()} of model {model}",
        f"{words.amount(sum(values), unit)} in all; the most in one step, {words.amount(max(values), unit)}.",
    )
    rows = [text_cells(label, words.amount(value, unit)) for label, value in zip(labels, values, strict=True)]
    table = Table(caption.title, [Column("From"), Column(unit.capitalize(), True)], rows)
    return Figure(caption.title, bar_chart(caption, labels, values), table)


def dead_letters(report: Report) -> Section | None:
    """Return the dead letters by reason; None if the role may not read them."""
    if report.dead_letters is None:
        return None
    title = "Dead letters by reason"
    if not report.dead_letters:
        return Section("dead-letters", title, ["There are no dead letters."])
    columns = [Column(name) for name in ("Pipeline", "Of", "Stage", "Error", "Oldest")]
    table = _table(
        "Dead letters, the most frequent reason first",
        [*columns, Column("Number", True)],
        report.dead_letters,
        lambda found: text_cells(
            found.pipeline,
            "rows" if found.version is None else f"chunks of version {found.version}",
            found.stage,
            found.error_code,
            words.moment(found.oldest_at),
            words.count(found.count),
        ),
    )
    sentence = "Error is the SQLSTATE; the reference of errors tells what each means."
    return Section("dead-letters", title, [sentence], [table])


def sizes(report: Report) -> Section:
    """Return the versions with their sizes."""
    title = "Versions and index sizes"
    if not report.versions:
        return Section("versions", title, ["There is no version yet."])
    names = ("Version", "Model", "State", "Index", "Gate", "Kept until")
    numbers = ("Vectors", "Missing", "Table", "Vector indexes", "ef_search", "Index recall")
    table = _table(
        "Versions", [*map(Column, names), *(Column(name, True) for name in numbers)], report.versions, _version
    )
    tables = sum(version.table_bytes or 0 for version in report.versions)
    indexes = sum(version.index_bytes or 0 for version in report.versions)
    return Section(
        "versions", title, [f"{words.size(tables)} of vectors and {words.size(indexes)} of indexes in all."], [table]
    )


def _version(version: VersionState) -> Sequence[Cell]:
    state = "serves" if version.serving else version.state
    return (
        *text_cells(
            f"{version.pipeline}, version {version.version}",
            f"{version.model}, {version.column_type}({version.dimensions})",
        ),
        Cell(state, "badge", "good" if version.serving else "plain"),
        Cell(version.index_state, "badge", _INDEX_TONES.get(version.index_state, "warn")),
        verdict_cell(version.gate),
        *text_cells(
            words.moment(version.rollback_until),
            words.count(version.vectors),
            words.count(version.missing),
            words.size(version.table_bytes),
            words.size(version.index_bytes),
            words.ABSENT if version.ef_search is None else str(version.ef_search),
            words.ratio(version.index_recall),
        ),
    )


def _each_step(step: timedelta, noun: str) -> str:
    name = {timedelta(hours=1): "hour", timedelta(days=1): "day"}.get(step, "week")
    return f"{noun} of each {name} (UTC)."


def _only_busiest(number: int, noun: str) -> list[str]:
    return [f"Charts show the first {MOST_CHARTS} of {number} {noun}."] if number > MOST_CHARTS else []


def _table(
    caption: str, columns: Sequence[Column], rows: Sequence[_Row], cells: Callable[[_Row], Sequence[Cell]]
) -> Table:
    shown = [cells(row) for row in rows[:MOST_ROWS]]
    return Table(caption, columns, shown, max(len(rows) - MOST_ROWS, 0))
