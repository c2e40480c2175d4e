"""Set what search does without a mode."""

from __future__ import annotations

from embedline.catalog.load import load_version
from embedline.catalog.rights import require_control
from embedline.errors import InvalidParameter, NotReady
from embedline.pipelines.state import load_alone
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.search.keyword_ranking import require_index
from embedline.search.request import MODES

# The last comparison of the mode with these vectors and these keywords.
_COMPARED = """
    SELECT e.verdict FROM embedline.evaluation AS e
    WHERE e.version_id = $1 AND e.kind = 'mode' AND e.fingerprint = $2 AND e.evidence ->> 'mode' = $3
        AND e.evidence ->> 'keyword' IS NOT DISTINCT FROM $4
    ORDER BY e.evaluation_id DESC LIMIT 1
"""
_STORE = "UPDATE embedline.version SET search_mode = $2, search_mode_reason = $3 WHERE version_id = $1"


@entry_point
def use_mode(session: Session, pipeline_name: str, mode: str, number: int | None, override_reason: str | None) -> None:
    """Store the mode of a version, the serving one if none is named.

    Raises NotReady if there is neither a pass nor a reason.

    The vectors alone need none: that is how a mode is undone.
    """
    require_control(session, pipeline_name)
    pipeline = load_alone(session, pipeline_name)
    if number is not None:
        pipeline = load_version(session, pipeline_name, number)
    version = pipeline.version
    if mode not in MODES:
        raise InvalidParameter(f'mode "{mode}" is not known', hint=f"Use one of {', '.join(MODES)}.")
    if mode != "vector":
        require_index(session, pipeline)
        found = session.scalar(
            _COMPARED,
            ["bigint", "text", "text", "text"],
            version.version_id,
            version.fingerprint,
            mode,
            pipeline.keyword,
        )
        if found != "pass" and not (override_reason or "").strip():
            raise NotReady(
                f'mode "{mode}" has no passing evaluation for version {version.number} of pipeline "{pipeline_name}"',
                detail=f"Its last evaluation is {found}." if found else "It was not evaluated.",
                hint=f"SELECT * FROM embedline.evaluate('{pipeline_name}', {version.number}, canaries => 'canary',"
                f" mode => '{mode}'); or give a reason: override_reason => '…'.",
            )
    reason = override_reason if mode != "vector" else None
    session.query(_STORE, ["bigint", "text", "text"], version.version_id, mode, reason)
