"""Switch on and off that searches note their texts."""

from __future__ import annotations

from embedline.catalog.load import load_pipeline
from embedline.catalog.rights import require_control
from embedline.errors import InvalidParameter
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session


@entry_point
def sample_queries(session: Session, pipeline_name: str, share: float | None, retention: str | None) -> None:
    """Have this share of searches noted, each for so long.

    With a share of 0 it removes what was noted.
    """
    require_control(session, pipeline_name)
    if share is None or not 0 <= share <= 1:
        raise InvalidParameter(
            f"share must be between 0 and 1, not {share}",
            hint=f"SELECT embedline.sample_queries('{pipeline_name}', share => 0.01);",
        )
    if retention is None or not session.scalar(
        "SELECT $1 > interval '0' AND $1 <= interval '1 year'", ["interval"], retention
    ):
        raise InvalidParameter(
            "retention must be above 0 and at most a year",
            hint=f"SELECT embedline.sample_queries('{pipeline_name}', 0.01, retention => '7 days');",
        )
    pipeline_id = load_pipeline(session, pipeline_name).pipeline_id
    session.query(
        "UPDATE embedline.pipeline SET query_sample_share = $2, query_retention = $3 WHERE pipeline_id = $1",
        ["bigint", "double precision", "interval"],
        pipeline_id,
        share,
        retention,
    )
    if share == 0:
        session.query("DELETE FROM embedline.query_sample WHERE pipeline_id = $1", ["bigint"], pipeline_id)
    session.query("SELECT embedline._purge_query_samples()")
