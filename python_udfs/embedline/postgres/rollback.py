"""Read in a subtransaction that is rolled back.

No lock and no side effect of the read remains.
"""

from __future__ import annotations

from collections.abc import Callable

from embedline.postgres.session import Session, T


class _ReadThrough(Exception):
    """Ends the subtransaction of `read_and_release`."""


def read_and_release(session: Session, read: Callable[[], T]) -> T:
    """Return the result of `read`, and roll back everything else that it did.

    The table locks that it took are released at once. The effects of a user's expression in this session are undone,
    too. A deferred trigger or a held cursor of the source's owner would otherwise run at the commit, with the session's
    rights. A search_path set by the expression would apply to our next statement.
    """
    found: list[T] = []
    try:
        with session.plpy.subtransaction():
            found.append(read())
            raise _ReadThrough
    except _ReadThrough:
        return found[0]
