"""Read in a subtransaction that is rolled back, so that no lock and no side effect stays."""

from __future__ import annotations

from collections.abc import Callable

from embedline.postgres.session import Session, T


class _ReadThrough(Exception):
    """Ends the subtransaction of `read_and_release`."""


def read_and_release(session: Session, read: Callable[[], T]) -> T:
    """Return what `read` finds, and undo all else that it did: it runs in a subtransaction that is rolled back.

    The locks of tables that it took are given back at once. And what a user's expression did besides, in this session, has no
    effect: a deferred trigger or a held cursor of the source's owner would run at the commit, with the rights of the session,
    and a search_path set by it would be that of our next statement.
    """
    found: list[T] = []
    try:
        with session.plpy.subtransaction():
            found.append(read())
            raise _ReadThrough
    except _ReadThrough:
        return found[0]
