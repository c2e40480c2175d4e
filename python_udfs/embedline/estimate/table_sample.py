"""Draw a sample of a table's rows, with the caller's rights.

The estimate of its embedding rests on it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from embedline.errors import InvalidParameter
from embedline.estimate.estimators import Amount, Sample, block_total
from embedline.postgres.run_as import Undone, run_as_owner
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import sqlstate_of

# Blocks of the largest table that is counted (400 MB). Larger tables are estimated from the sampled blocks.
_COUNTED_BLOCKS = 50_000
# Characters of a content that are chunked and counted; the rest is taken to be like them.
_MAX_CHARACTERS = 10_000

_BLOCKS = """
    SELECT coalesce(sum(pg_relation_size(c.oid)), 0)::bigint / current_setting('block_size')::bigint AS blocks
    FROM (SELECT $1::oid AS relid UNION SELECT relid FROM pg_partition_tree($1::oid::regclass) WHERE isleaf) AS leaf
    JOIN pg_class AS c ON c.oid = leaf.relid AND c.relkind IN ('r', 'm')
"""
# A hash of the row's place chooses within the blocks, so that the same table gives the same sample again.
_SAMPLE = """
    SELECT s.relation, s.block, s.accepted, left(s.content, {characters}) AS content, char_length(s.content) AS characters,
        left(s.prefix, {characters}) AS prefix
    FROM (
        SELECT t.tableoid::bigint AS relation, (t.ctid::text::point)[0]::bigint AS block, {accepted} AS accepted,
            CASE WHEN {accepted} THEN ({content})::text END AS content, ({prefix})::text AS prefix
        FROM {source} AS t TABLESAMPLE SYSTEM ({percent}) REPEATABLE (1)
        WHERE (hashtextextended(t.ctid::text, 1) & 1048575) < {threshold}
        OFFSET 0
    ) AS s
"""
_SAMPLE_COLUMNS = "relation bigint, block bigint, accepted boolean, content text, characters integer, prefix text"
_BLOCK_ROWS = """
    SELECT count(*) AS row_count FROM {source} AS t TABLESAMPLE SYSTEM ({percent}) REPEATABLE (1)
    GROUP BY t.tableoid, (t.ctid::text::point)[0]
"""


@dataclass(frozen=True)
class Subject:
    """A table and the SQL expressions that are read of each row.

    `source` is the qualified, quoted name. `search_path` resolves the expressions; None if they are fully qualified.
    They run as role `run_as`; None for the caller.
    """

    source: str
    oid: int
    content: str
    filter: str | None = None
    prefix: str | None = None
    search_path: str | None = None
    run_as: str | None = None


@dataclass(frozen=True)
class SampledRow:
    """One row of a sample.

    It has the filter's decision, the beginning of its content and prefix, and the whole content's length.
    """

    accepted: bool
    content: str | None
    prefix: str
    characters: int


def draw(session: Session, subject: Subject, sample_rows: int) -> tuple[Sample, list[SampledRow], str]:
    """Draw about `sample_rows` rows, few from each of many blocks.

    Returns the sample, its rows, and "counted" or "estimated" for the table's rows, the latter from the sampled blocks.
    """
    blocks = int(session.scalar(_BLOCKS, ["bigint"], subject.oid))
    share = min(1.0, sample_rows / max(blocks, 1))
    percent = f"{100 * share:.6f}"
    if blocks <= _COUNTED_BLOCKS:
        count = session.execute(f"SELECT count(*) AS row_count FROM {subject.source}")[0]["row_count"]
        population, how = Amount(float(count)), "counted"
    else:
        counts = session.execute(_BLOCK_ROWS.format(source=subject.source, percent=percent))
        population, how = block_total([int(row["row_count"]) for row in counts], blocks), "estimated"
    wanted = min(1.0, sample_rows / max(population.value * share, 1.0))
    statement = _SAMPLE.format(
        characters=_MAX_CHARACTERS, content=subject.content, prefix=subject.prefix or "NULL", source=subject.source,
        accepted=f"coalesce(({subject.filter}), false)" if subject.filter else "true",
        percent=percent, threshold=round(wanted * 1048576),
    )  # fmt: skip
    rows = _evaluate(session, subject, statement)
    clusters = [(int(row["relation"]), int(row["block"])) for row in rows]
    sampled = [
        SampledRow(bool(row["accepted"]), row["content"], row["prefix"] or "", int(row["characters"] or 0))
        for row in rows
    ]
    return Sample(population, clusters, every_block=share == 1.0), sampled, how


def _evaluate(session: Session, subject: Subject, statement: str) -> list[dict[str, Any]]:
    try:
        if subject.search_path is not None:
            session.query("SELECT set_config('search_path', $1, true)", ["text"], subject.search_path)
        if subject.run_as is None:
            return session.execute(statement)
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(Undone), session.plpy.subtransaction():
            rows = run_as_owner(session, subject.run_as, statement, columns=_SAMPLE_COLUMNS)
            raise Undone
        return rows
    except Exception as error:
        state = sqlstate_of(error)
        if state[:2] not in ("42", "22", "0A") or state == "42501":
            raise
        raise InvalidParameter(
            f"the content of {subject.source} cannot be read: {error}",
            hint="Give an expression over the table's columns, such as title || E'\\n\\n' || body.",
        ) from error
    finally:
        session.execute("SET LOCAL search_path = pg_catalog, pg_temp")
