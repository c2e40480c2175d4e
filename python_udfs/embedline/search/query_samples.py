"""Note the text of a search, where an administrator has switched that on."""

from __future__ import annotations

from embedline.catalog.values import Pipeline
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of

# A standby and a read-only transaction cannot note anything. A serializable one could fail because of it.
_MAY_NOTE = """
    SELECT NOT current_setting('transaction_read_only')::boolean
        AND current_setting('transaction_isolation') <> 'serializable' AS may
"""


def note(session: Session, pipeline: Pipeline, query: str) -> None:
    """Note the text of a search that has its answer.

    A failure of the database does not reach the caller.
    """
    if not session.scalar(_MAY_NOTE):
        return
    try:
        with session.plpy.subtransaction():
            session.query("SELECT embedline._note_query($1, $2)", ["bigint", "text"], pipeline.pipeline_id, query)
    except session.plpy.SPIError as error:
        if sqlstate_of(error) in ENDING:
            raise
