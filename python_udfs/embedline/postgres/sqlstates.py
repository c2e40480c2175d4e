"""Name SQLSTATEs that several modules handle, and read the one of an error."""

from __future__ import annotations

# A lock timeout, a full disk, and a table that does not exist.
LOCK_NOT_AVAILABLE = "55P03"
DISK_FULL = "53100"
UNDEFINED_TABLE = "42P01"
INSUFFICIENT_PRIVILEGE = "42501"
# A function whose body does not return its type.
WRONG_RESULT_TYPE = "42P13"
# SQLSTATEs if another transaction has dropped a table or changed the columns or types of its key: undefined_table,
# undefined_column, datatype_mismatch, invalid_text_representation.
CHANGED_TABLE = (UNDEFINED_TABLE, "42703", "42804", "22P02")
# The class of full disks, memory that is short, and too many connections.
INSUFFICIENT_RESOURCES = "53"
# Classes of errors that an expression raises for a row each time. They are data exceptions, wrong text for a type, an error
# raised by a function, a missing right or function, and a limit of PostgreSQL's.
OF_A_ROW = ("21", "22", "23", "38", "39", "42", "54", "P0")
# Classes that are no row's: no error of the database, connections, the transaction, locks, resources, the end of the session,
# the disk, foreign servers. All others may pass, such as a damaged value: a change of the schema causes some of them.
NOT_OF_A_ROW = ("", "08", "25", "40", "53", "55", "57", "58", "72", "HV")
# SQLSTATEs that end the session or the statement. Code that retries after errors must raise these again.
QUERY_CANCELED = "57014"
ENDING = (QUERY_CANCELED, "57P01", "57P02", "57P03")


def sqlstate_of(error: BaseException) -> str:
    """Return an error's SQLSTATE, or '' if it is not the database's error."""
    if state := getattr(error, "sqlstate", None):
        return str(state)
    # PL/Python names only PostgreSQL's own states. Others, which functions of users raise, are in a number of six bits each.
    packed = (getattr(error, "spidata", None) or (None,))[0]
    return "" if packed is None else "".join(chr((packed >> 6 * place & 63) + ord("0")) for place in range(5))
