"""Read an exported file back into a version of the same fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from embedline.client.connection import Connection
from embedline.client.transfer.files import FORMAT, UnusableFile
from embedline.client.transfer.forms import reader_of
from embedline.client.transfer.lending import batch_rows, lend
from embedline.client.transfer.recipe import VersionRecipe, differences, read_recipe
from embedline.errors import InvalidParameter


class OtherFingerprint(InvalidParameter):
    """The file has vectors of another recipe."""


def lend_file(
    connection: Connection,
    pipeline: str,
    version: int | None,
    path: Path,
    progress: Callable[[str, int, int | None], None],
) -> tuple[VersionRecipe, int, int]:
    """Lend a file's vectors to a version.

    Returns the version, the number of vectors in the file, and how many of them are new.
    Raises OtherFingerprint, EmbedlineError, psycopg.Error, OSError.
    """
    recipe = read_recipe(connection, pipeline, version)
    reader = reader_of(path)
    try:
        metadata = reader.metadata
        if metadata.get("format") != FORMAT:
            raise UnusableFile(
                f"{path} has format {metadata.get('format')!r}, this embedline reads {FORMAT}",
                hint="Import it with the version of Embedline that wrote it, or a later one.",
            )
        if metadata["fingerprint"] != recipe.fingerprint:
            differing = differences(metadata["recipe"], recipe.recipe)
            raise OtherFingerprint(
                f'{path} has vectors of another recipe than version {recipe.version} of pipeline "{pipeline}"',
                detail="; ".join(differing) or None,
                hint="Create a pipeline or a version with the recipe of the file. Vectors of another model would answer"
                " every search with nonsense.",
            )
        given, lent = lend(
            connection, recipe, reader.batches(batch_rows(recipe.dimensions)), reader.row_count, progress
        )
    finally:
        reader.close()
    return recipe, given, lent
