"""Compute derived vectors: the weighted means of the vectors of a subject's items.

One transaction takes subjects out of the queue, locks their rows, and only then reads events and vectors. So two workers
that meet at one subject write one after the other, and the second has seen what the first saw. Applications hold none of
these locks. No statement here waits for one of theirs: a table of events that is locked is left for later.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from embedline.catalog.derived import Derived
from embedline.catalog.values import Pipeline
from embedline.core import vectors
from embedline.core.sql_text import quote_ident
from embedline.documents.copy import copy_matrix
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session
from embedline.queue.outbox import key_columns

# Rows of the queue of items that one transaction takes; each has up to 100 items.
_ROWS = 20
# Events of several subjects are read together up to this number of subjects.
_SUBJECTS = 500
# Squared norm of a mean, against the greatest squared norm of its parts, below which it has no direction: rounding alone
# would decide it.
_NO_DIRECTION = 1e-12


@dataclass
class Computed:
    """The vectors of subjects, by version number.

    `positions` are the subjects that have one; `matrices` has their vectors in the same order.
    """

    item_counts: list[int]
    event_counts: list[int]
    positions: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)
    matrices: dict[int, vectors.FloatMatrix] = field(default_factory=dict)


def move_items(session: Session, derived: Derived) -> bool:
    """Queue the subjects of changed items; return True if there were any."""
    items, dirty = derived.generated("items"), derived.generated("dirty")
    rows = session.query(
        f"DELETE FROM {items} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {items} LIMIT {_ROWS} FOR UPDATE SKIP LOCKED))"
        " RETURNING items"
    )
    if not rows:
        return False
    session.query(
        f"INSERT INTO {dirty} (subjects) SELECT array_agg(d.subject) FROM (SELECT s.subject, row_number() OVER () AS place"
        f" FROM {derived.generated('of_items')}($1) AS s (subject)) AS d GROUP BY (d.place - 1) / 100",
        ["text[]"],
        sorted({item for row in rows for item in row["items"]}),
    )
    return True


def take_subjects(session: Session, derived: Derived) -> list[str] | None:
    """Take subjects out of the queue, as texts; None if all subjects count as changed.

    The rest of a queue's row goes back, so that the subjects of one call stay few.
    """
    dirty = derived.generated("dirty")
    # A row has one subject, or a hundred: as many rows as make up the number wanted.
    count = session.scalar(
        "SELECT count(*) FROM (SELECT sum(cardinality(q.subjects)) OVER (ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)"
        f" AS before FROM (SELECT d.subjects FROM {dirty} AS d LIMIT {_SUBJECTS}) AS q) AS r"
        f" WHERE coalesce(r.before, 0) < {_SUBJECTS}"
    )
    rows = session.query(
        f"DELETE FROM {dirty} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {dirty} LIMIT $1 FOR UPDATE SKIP LOCKED))"
        " RETURNING subjects::text[] AS subjects",
        ["bigint"],
        count,
    )
    taken = list(dict.fromkeys(subject for row in rows for subject in row["subjects"] or ()))
    is_all = any(row["subjects"] is None for row in rows)
    kept = [] if is_all else taken[:_SUBJECTS]
    put_back(session, derived, [] if is_all else taken[_SUBJECTS:])
    return None if is_all else kept


def put_back(session: Session, derived: Derived, subjects: Sequence[str]) -> None:
    """Queue subjects."""
    for start in range(0, len(subjects), 100):
        session.query(
            f"INSERT INTO {derived.generated('dirty')} (subjects) VALUES ($1::text[]::{derived.subject_type}[])",
            ["text[]"],
            list(subjects[start : start + 100]),
        )


def queue_all(session: Session, derived: Derived) -> None:
    """Queue all subjects: those of the events, and those that are stored.

    Reads all events. A subject whose event is not committed yet is queued by its own write.
    """
    session.query(
        f"INSERT INTO {derived.generated('dirty')} (subjects) SELECT array_agg(d.subject) FROM ("
        "SELECT u.subject, row_number() OVER () AS place FROM ("
        f"SELECT a.subject FROM {derived.generated('all')}() AS a (subject)"
        f" UNION SELECT s.subject FROM {derived.generated('subject')} AS s) AS u) AS d GROUP BY (d.place - 1) / 100"
    )
    session.query(
        "UPDATE embedline.derived SET swept_at = clock_timestamp() WHERE derived_id = $1",
        ["bigint"],
        derived.derived_id,
    )


def recompute(session: Session, derived: Derived, versions: Sequence[Pipeline], subjects: Sequence[str]) -> None:
    """Compute and write the vectors of subjects, in every version.

    Subjects that another worker has in flight are queued again.
    """
    locked = _lock(session, derived, subjects)
    put_back(session, derived, [subject for subject in subjects if subject not in locked])
    mine = list(locked)
    if not mine:
        return
    computed = compute(session, derived, versions, mine)
    ids = np.array([locked[subject] for subject in mine], dtype=np.int64)
    for version in versions:
        number, table = version.version.number, derived.vectors(version.version.number)
        session.query(f"DELETE FROM {table} WHERE subject_id = ANY ($1)", ["bigint[]"], ids.tolist())
        if computed.positions[number].size:
            copy_matrix(session, table, ids[computed.positions[number]], computed.matrices[number])
    session.query(
        f"UPDATE {derived.generated('subject')} AS s SET item_count = c.items, event_count = c.events,"
        " computed_at = clock_timestamp()"
        " FROM unnest($1, $2, $3) AS c (subject_id, items, events) WHERE s.subject_id = c.subject_id AND c.events > 0",
        ["bigint[]", "integer[]", "bigint[]"],
        ids.tolist(), computed.item_counts, computed.event_counts,
    )  # fmt: skip
    gone = [int(ids[i]) for i, count in enumerate(computed.event_counts) if not count]
    if gone:
        session.query(f"DELETE FROM {derived.generated('subject')} WHERE subject_id = ANY ($1)", ["bigint[]"], gone)


def _lock(session: Session, derived: Derived, subjects: Sequence[str]) -> dict[str, int]:
    """Return the ids of the subjects whose rows are locked now, by subject.

    New rows are inserted in one order, so that two workers that insert the same ones cannot deadlock. Rows that are there
    are not waited for.
    """
    table, of_type = derived.generated("subject"), f"$1::text[]::{derived.subject_type}[]"
    session.query(
        f"INSERT INTO {table} (subject) SELECT u.subject FROM unnest({of_type}) AS u (subject)"
        f" WHERE NOT EXISTS (SELECT FROM {table} AS s WHERE s.subject = u.subject) ORDER BY u.subject"
        " ON CONFLICT (subject) DO NOTHING",
        ["text[]"],
        list(subjects),
    )
    rows = session.query(
        f"SELECT s.subject_id, s.subject::text AS subject FROM {table} AS s WHERE s.subject = ANY ({of_type})"
        " FOR UPDATE SKIP LOCKED",
        ["text[]"],
        list(subjects),
    )
    return {str(row["subject"]): int(row["subject_id"]) for row in rows}


def compute(session: Session, derived: Derived, versions: Sequence[Pipeline], subjects: Sequence[str]) -> Computed:
    """Return the vectors of subjects; writes nothing."""
    rows = session.query(
        f"SELECT ordinality, item, weight, event_count FROM {derived.generated('read')}($1::text[]::{derived.subject_type}[])",
        ["text[]"],
        list(subjects),
    )
    events = [0] * len(subjects)
    for row in rows:
        events[row["ordinality"] - 1] += int(row["event_count"])
    items = list(dict.fromkeys(str(row["item"]) for row in rows))
    place = {item: i for i, item in enumerate(items)}
    owner = np.array([row["ordinality"] - 1 for row in rows], dtype=np.int64)
    of_item = np.array([place[str(row["item"])] for row in rows], dtype=np.int64)
    weight = np.array([row["weight"] for row in rows], dtype=np.float64)
    computed = Computed([0] * len(subjects), events)
    for version in versions:
        found, matrix = item_vectors(session, version, items)
        known = found[of_item] >= 0 if rows else np.zeros(0, dtype=bool)
        sums, total = _sums(matrix, found, owner[known], of_item[known], weight[known], len(subjects))
        positions, means = _means(version, sums, total)
        computed.positions[version.version.number] = positions
        computed.matrices[version.version.number] = means
        if version.is_serving:
            computed.item_counts = np.bincount(owner[known], minlength=len(subjects)).tolist()
    return computed


def _sums(
    matrix: npt.NDArray[np.float64],
    found: npt.NDArray[np.int64],
    owner: npt.NDArray[np.int64],
    of_item: npt.NDArray[np.int64],
    weight: npt.NDArray[np.float64],
    count: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the weighted sums of the vectors of each subject's items.

    Beside them (sum of weights, sum of their sizes) of each.
    """
    sums = np.zeros((count, matrix.shape[1]))
    order = np.argsort(owner, kind="stable")
    owner, of_item, weight = owner[order], of_item[order], weight[order]
    present, starts = np.unique(owner, return_index=True)
    if present.size:
        sums[present] = np.add.reduceat(matrix[found[of_item]] * weight[:, np.newaxis], starts, axis=0)
    total = np.zeros((count, 2))
    np.add.at(total, owner, np.column_stack([weight, np.abs(weight)]))
    return sums, total


def _means(
    version: Pipeline, sums: npt.NDArray[np.float64], total: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], vectors.FloatMatrix]:
    """Return which subjects have a vector, and these vectors.

    They are of length 1, unless the version's vectors are not: then they are the means themselves.
    """
    sizes = np.where(total[:, 1] > 0, total[:, 1], 1.0)
    relative = sums / sizes[:, np.newaxis]
    squared = np.einsum("ij,ij->i", relative, relative)
    usable = (total[:, 1] > 0) & np.isfinite(squared) & (squared > _NO_DIRECTION)
    if version.version.distance == "l2":
        usable &= np.abs(total[:, 0]) > _NO_DIRECTION * sizes
        positions = np.flatnonzero(usable)
        means = sums[positions] / total[positions, :1]
    else:
        positions = np.flatnonzero(usable)
        means = relative[positions] / np.sqrt(squared[positions])[:, np.newaxis]
    return positions, means.astype(np.float32)


def item_vectors(
    session: Session, version: Pipeline, items: Sequence[str]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the means of items' chunks as a matrix, and the place of each item in it.

    The place of an item without a vector is -1.
    """
    keys = [_key_of(item, len(version.key_columns)) for item in items]
    usable = [i for i, key in enumerate(keys) if key is not None]
    found = np.full(len(items), -1, dtype=np.int64)
    rows: list[dict[str, Any]] = []
    if usable:
        schema, column = vector_schema(session), quote_ident(version.version.column)
        rows = session.query(
            f"SELECT k.ordinality, {schema}.vector_send({schema}.avg(v.{column}::{schema}.vector)) AS mean"
            f" FROM unnest({version.key_arrays()}) WITH ORDINALITY AS k ({version.key_list}, ordinality)"
            f" JOIN {version.chunk} AS c ON {version.key_join('c', 'k')} JOIN {version.vectors} AS v ON v.chunk_id = c.chunk_id"
            " GROUP BY k.ordinality",
            version.key_parameter_types,
            *key_columns([key for i in usable if (key := keys[i]) is not None], len(version.key_columns)),
        )
    if not rows:
        return found, np.zeros((0, version.version.dimensions))
    found[[usable[row["ordinality"] - 1] for row in rows]] = np.arange(len(rows))
    return found, vectors.vectors_from_send([row["mean"] for row in rows], "vector").astype(np.float64)


def _key_of(item: str, count: int) -> tuple[str, ...] | None:
    """Return the key's columns, None if the item cannot be a key of so many columns."""
    if count == 1:
        return (item,)
    try:
        parts = json.loads(item)
    except ValueError:
        return None
    if not isinstance(parts, list) or len(parts) != count or any(part is None for part in parts):
        return None
    return tuple(part if isinstance(part, str) else json.dumps(part) for part in parts)
