"""Adopt a table of vectors.

The pipeline is created if need be. The vectors are checked and lent, and chunks take them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import psycopg

from embedline.client.connection import Connection
from embedline.client.transfer.foreign import ForeignTable
from embedline.client.transfer.lending import Lent, Progress, lend, settle
from embedline.client.transfer.recipe import VersionRecipe, exists, read_recipe
from embedline.errors import AlreadyExists, InvalidParameter, NotFound

_CREATE = """
    SELECT embedline.create_pipeline(%(name)s, %(source)s::regclass, %(content)s, %(model)s,
        chunking => coalesce(%(chunking)s, 'recursive'), chunk_tokens => %(tokens)s, chunk_overlap => %(overlap)s)
"""
_PAUSE, _RESUME = "SELECT embedline.pause_pipeline(%s)", "SELECT embedline.resume_pipeline(%s)"
_DROP = "SELECT embedline.drop_pipeline(%s)"


@dataclass(frozen=True)
class NewPipeline:
    """A pipeline that is to be created; all None if it is there."""

    source: str | None
    content: str | None
    chunking: str | None
    chunk_tokens: int | None
    chunk_overlap: int | None

    @property
    def is_wanted(self) -> bool:
        """Return True if any of it is given."""
        return self != NewPipeline(None, None, None, None, None)


@dataclass(frozen=True)
class Request:
    """What is to be adopted. A trial changes nothing."""

    pipeline: str
    table: str
    model: str
    chunk: str
    embedding: str
    new: NewPipeline
    sample: int
    is_forced: bool
    is_trial: bool


@dataclass(frozen=True)
class Adopted:
    """The result of an adoption, or of a trial.

    A trial tells that `matching` of `compared` chunks would find a vector, and has no `result`.
    """

    created: bool
    checked: dict[str, Any] | None
    skipped: str | None
    result: Lent | None = None
    matching: int | None = None
    compared: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for a program."""
        found = {"created": self.created, "checked": self.checked, "left_out": self.skipped}
        return found if self.result is not None else {**found, "matching": self.matching, "compared": self.compared}


class _Trial(Exception):
    """Undoes what a trial has done."""


def adopt(connection: Connection, request: Request, progress: Progress) -> Adopted:
    """Adopt the vectors of a table.

    A new pipeline is paused until all vectors are lent, so that no worker pays for one meanwhile. If they are refused, the
    pipeline is not created. Raises EmbedlineError, psycopg.Error.
    """
    is_there = exists(connection, request.pipeline)
    _check_new(request, is_there)
    trial: Adopted | None = None
    try:
        with connection.transaction():
            if not is_there:
                _create(connection, request)
            recipe = read_recipe(connection, request.pipeline, None)
            table = _table(connection, recipe, request)
            checked = table.check(request.sample)
            if not request.is_forced:
                table.require_model(checked)
            if request.is_trial:
                matching, compared = table.trial()
                trial = Adopted(False, checked, table.told_skipped(), None, matching, compared)
                raise _Trial
    except _Trial:
        assert trial is not None
        return trial
    try:
        with connection.transaction():
            given, lent = lend(connection, recipe, table.batches(), table.row_count(), progress)
            if not is_there:
                connection.execute(_RESUME, (request.pipeline,))
    except BaseException:
        if not is_there:
            # It has nothing yet, and a second run creates it again.
            with contextlib.suppress(psycopg.Error):
                connection.execute(_DROP, (request.pipeline,))
        raise
    result = settle(connection, recipe, given, lent, progress, waits=True)
    return Adopted(not is_there, checked, table.told_skipped(), result)


def _check_new(request: Request, is_there: bool) -> None:
    if is_there and request.new.is_wanted:
        raise AlreadyExists(
            f'there is a pipeline "{request.pipeline}" already',
            hint="Leave out --source, --content and the options of chunking; or choose another name.",
        )
    if not is_there and (request.new.source is None or request.new.content is None):
        raise NotFound(
            f'there is no pipeline "{request.pipeline}"',
            hint=f"--source TABLE --content 'EXPRESSION' creates it: embedline adopt {request.pipeline} {request.table}"
            f" --model {request.model} --source TABLE --content body",
        )


def _create(connection: Connection, request: Request) -> None:
    new = request.new
    connection.execute(
        _CREATE,
        {
            "name": request.pipeline, "source": new.source, "content": new.content, "model": request.model,
            "chunking": new.chunking, "tokens": new.chunk_tokens, "overlap": new.chunk_overlap,
        },
    )  # fmt: skip
    connection.execute(_PAUSE, (request.pipeline,))


def _table(connection: Connection, recipe: VersionRecipe, request: Request) -> ForeignTable:
    if recipe.model_name != request.model:
        raise InvalidParameter(
            f'pipeline "{request.pipeline}" has model "{recipe.model_name}", not "{request.model}"',
            hint="Vectors of another model can only be adopted by another pipeline.",
        )
    return ForeignTable.find(connection, recipe, request.table, request.chunk, request.embedding)
