"""Read rows so that one whose expression raises fails alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from embedline.catalog.source import hidden_source
from embedline.catalog.values import Pipeline
from embedline.documents.values import ReadRow
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import NOT_OF_A_ROW, sqlstate_of
from embedline.queue.outbox import Key

Read = Callable[[Sequence[Key]], Mapping[int, ReadRow]]


def read_isolated(
    session: Session, pipeline: Pipeline, keys: Sequence[Key], read: Read
) -> tuple[dict[int, ReadRow], dict[int, Exception]]:
    """Return the rows of keys, and the errors of keys whose expression raises.

    Both are by index of the key. A failed read is tried again by halves until each such key stands alone. Raises an error
    that is no row's, such as that of a source whose rows are hidden.
    """
    found: dict[int, ReadRow] = {}
    failed: dict[int, Exception] = {}
    parts = [(0, len(keys))] if keys else []
    while parts:
        first, last = parts.pop()
        try:
            part = read(keys[first:last])
        except Exception as error:
            if sqlstate_of(error)[:2] in NOT_OF_A_ROW:
                raise
            if (hidden := hidden_source(session, pipeline.source_oid)) is not None:
                raise hidden from error  # A fault of the whole source, since the claim.
            if last - first == 1:
                failed[first] = error
            else:
                middle = (first + last) // 2
                parts += [(middle, last), (first, middle)]
        else:
            found |= {first + index: row for index, row in part.items()}
    return found, failed
