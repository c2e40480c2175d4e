"""Check whether vectors from outside are those of a version's model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedline.catalog.modality import require_text
from embedline.catalog.rights import require_control
from embedline.documents.loans import matrix_of, version_of
from embedline.errors import InvalidParameter
from embedline.models.document_embedding import lowest_cosine
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.verify.model_drift import MAX_SAMPLE, cosines_of, embed_fresh


@entry_point
def check_vectors(
    session: Session, pipeline_name: str, version: int | None, texts: Sequence[str], sent: Sequence[bytes]
) -> list[dict[str, Any]]:
    """Embed texts, and compare the vectors with those given.

    Returns one row: how many were compared, how many are of another model, the lowest cosine and the least that passes.
    The texts are embedded within budgets and limits, as those of verify.
    """
    require_control(session, pipeline_name)
    pipeline = version_of(session, pipeline_name, version)
    require_text(pipeline, "a loan of vectors")
    if None in texts or None in sent or len(texts) != len(sent) or not 1 <= len(texts) <= MAX_SAMPLE:
        raise InvalidParameter(f"there must be 1 to {MAX_SAMPLE} texts with a vector each, and none of them NULL")
    matrix = matrix_of(pipeline, sent)
    fresh, _ = embed_fresh(session, pipeline, [text.strip() for text in texts])
    cosines, required = cosines_of(matrix, fresh), lowest_cosine(pipeline.version.model.config)
    return [
        {
            "compared": len(texts),
            "of_another_model": int((cosines < required).sum()),
            "lowest_cosine": float(cosines.min()),
            "required_cosine": required,
        }
    ]
