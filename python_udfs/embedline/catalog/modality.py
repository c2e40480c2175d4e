"""Refuse what is for texts alone."""

from __future__ import annotations

from embedline.catalog.values import Pipeline
from embedline.errors import InvalidParameter


def require_text(pipeline: Pipeline, what: str) -> None:
    """Raise InvalidParameter unless a pipeline's contents are texts.

    `what` names the work that reads them.
    """
    if pipeline.modality != "text":
        raise InvalidParameter(
            f'pipeline "{pipeline.name}" embeds files of modality {pipeline.modality}, and {what} is for texts alone'
        )
