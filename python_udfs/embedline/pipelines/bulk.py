"""Which changes of a pipeline may wait for the provider's batch endpoint."""

from __future__ import annotations

from embedline.catalog.load import load_pipeline
from embedline.catalog.rights import require_control
from embedline.errors import InvalidParameter
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session

# Two calls at the same time follow each other, and the later one stays.
_STORE = """
    INSERT INTO embedline.bulk_rule (pipeline_id, bulk_rows, starts_at, ends_at) VALUES ($1, $2, $3, $4)
    ON CONFLICT (pipeline_id) DO UPDATE
    SET bulk_rows = excluded.bulk_rows, starts_at = excluded.starts_at, ends_at = excluded.ends_at
"""


@entry_point
def configure_bulk(
    session: Session, name: str, bulk_rows: int | None, window_start: str | None, window_end: str | None
) -> None:
    """Set the rule of a pipeline, or remove it."""
    require_control(session, name)
    pipeline = load_pipeline(session, name)
    if bulk_rows is not None and bulk_rows < 1:
        raise InvalidParameter(
            "bulk_rows must be at least 1", hint="Leave it out for changes of any size to go at once."
        )
    if (window_start is None) != (window_end is None) or (window_start is not None and window_start == window_end):
        raise InvalidParameter(
            "a window of the day needs two different times",
            hint="For example window_start => '22:00', window_end => '05:00', in UTC.",
        )
    if pipeline.tenant is not None:
        raise InvalidParameter(
            f'the changes of pipeline "{name}" are shared out between its tenants',
            hint="Only backfills of such a pipeline can wait.",
        )
    if bulk_rows is None and window_start is None:
        session.query("DELETE FROM embedline.bulk_rule WHERE pipeline_id = $1", ["bigint"], pipeline.pipeline_id)
        return
    session.query(
        _STORE,
        ["bigint", "integer", "time", "time"],
        pipeline.pipeline_id,
        bulk_rows,
        window_start,
        window_end,
    )
