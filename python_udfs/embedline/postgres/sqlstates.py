"""SQLSTATEs that are handled in more than one module, and the one of an error."""

from __future__ import annotations

# SQLSTATEs that are handled in more than one place.
LOCK_NOT_AVAILABLE = "55P03"
UNDEFINED_TABLE = "42P01"
# A table that another transaction has dropped, or given a key of other columns or types: undefined_table, undefined_column,
# datatype_mismatch, invalid_text_representation.
CHANGED_TABLE = (UNDEFINED_TABLE, "42703", "42804", "22P02")
# The end of the session, or of the statement: whoever tries again after errors lets these through.
ENDING = ("57014", "57P01", "57P02", "57P03")


def sqlstate_of(error: BaseException) -> str:
    """Return an error's SQLSTATE, or '' where it is none of the database's."""
    return str(getattr(error, "sqlstate", None) or "")
