"""Name SQLSTATEs that several modules handle, and read the one of an error."""

from __future__ import annotations

# A lock timeout, and a table that does not exist.
LOCK_NOT_AVAILABLE = "55P03"
UNDEFINED_TABLE = "42P01"
# SQLSTATEs if another transaction has dropped a table or changed the columns or types of its key: undefined_table,
# undefined_column, datatype_mismatch, invalid_text_representation.
CHANGED_TABLE = (UNDEFINED_TABLE, "42703", "42804", "22P02")
# SQLSTATEs that end the session or the statement. Code that retries after errors must raise these again.
ENDING = ("57014", "57P01", "57P02", "57P03")


def sqlstate_of(error: BaseException) -> str:
    """Return an error's SQLSTATE, or '' if it is not the database's error."""
    return str(getattr(error, "sqlstate", None) or "")
