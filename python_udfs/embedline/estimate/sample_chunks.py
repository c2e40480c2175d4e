"""Cut a sample of a pipeline's rows as its workers would."""

from __future__ import annotations

import contextlib
from typing import Any

from embedline.chunking.factory import make_chunker
from embedline.core.text import repair_text
from embedline.errors import InvalidParameter, UnusableText
from embedline.estimate.measure import check_sample_rows
from embedline.estimate.plan import find_plan
from embedline.estimate.table_sample import draw
from embedline.models.pool import let_cancel_through
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.session import Session

_TOKENIZER = """
    SELECT s.tokenizer FROM embedline.chunk_set AS s
    JOIN embedline.pipeline AS p ON p.pipeline_id = s.pipeline_id
    JOIN embedline.version AS v ON v.version_id = p.serving_version_id AND v.chunk_set = s.number
    WHERE p.name = $1
"""


@entry_point
def sample_chunks(session: Session, pipeline_name: str, sample_rows: int) -> list[dict[str, Any]]:
    """Return the chunks of a sample of rows. Asks no model.

    Rows with more than 10,000 characters are left out, because the sample has only their beginnings. Raises
    InvalidParameter for semantic chunking, which would have to embed each sentence.
    """
    require_given(sample_rows=sample_rows)
    check_sample_rows(sample_rows)
    plan, _ = find_plan(session, pipeline_name, None, None, "pg_catalog")
    if plan.spec.method == "semantic":
        raise InvalidParameter("semantic chunking asks the model for each sentence, so no sample is cut")
    _, rows, _ = draw(session, plan.subject, sample_rows)
    tokenizer = session.scalar(_TOKENIZER, ["text"], pipeline_name)
    chunker, breathe = make_chunker(plan.spec, tokenizer, None), let_cancel_through(session)
    found = []
    for row in rows:
        if row.content is None or row.characters > len(row.content):
            continue
        # A row without a text to embed becomes a dead letter and has no chunk.
        with contextlib.suppress(UnusableText):
            chunks = chunker(repair_text(row.content), breathe, repair_text(row.prefix) if row.prefix else "")
            found += [{"chunk": chunk.content, "prefix": chunk.prefix or None} for chunk in chunks]
        breathe()
    return found
