"""Names of the objects that Embedline generates, each put together in one place.

Names here are neither qualified nor quoted; see `postgres.relations`.
"""

from __future__ import annotations

# Capture triggers of a pipeline, by the event of the source.
EVENTS = ("insert", "update", "delete", "truncate")


def generated(pipeline: str, suffix: str) -> str:
    """Return the name of a pipeline's table or function, such as docs_inbox."""
    return f"{pipeline}_{suffix}"


def chunk_suffix(chunk_set: int) -> str:
    """Return the suffix of a chunk set's table, such as chunk_2."""
    return "chunk" if chunk_set == 1 else f"chunk_{chunk_set}"


def keyword_suffix(chunk_set: int, part: str) -> str:
    """Return the suffix of a table of a chunk set's keyword index (keyword_page)."""
    return f"keyword_{part}" if chunk_set == 1 else f"keyword_{chunk_set}_{part}"


def version_suffix(number: int, part: str | None = None) -> str:
    """Return the suffix of a version's table (v2) or of a part of it (v2_exact)."""
    return f"v{number}" if part is None else f"v{number}_{part}"


def of_version(pipeline: str, number: int, part: str | None = None) -> str:
    """Return the name of a version's table, or of a part (docs_v2_exact)."""
    return generated(pipeline, version_suffix(number, part))


def vector_column(number: int) -> str:
    """Return the column of a version's vectors."""
    return f"embedding_v{number}"


def vector_index(pipeline: str, number: int, precision: str | None = None) -> str:
    """Return the name of the index of a version's column, or of a precision."""
    return of_version(pipeline, number, f"{precision or 'embedding'}_idx")


def view(pipeline: str, number: int | None = None) -> str:
    """Return the name of the routing view, or of the view over one version."""
    return generated(pipeline, "embedding" if number is None else vector_column(number))


def trigger(pipeline: str, event: str) -> str:
    """Return the name of a capture trigger on the source."""
    return f"embedline_{pipeline}_{event}"


def capture_suffix(event: str) -> str:
    """Return the suffix of a capture trigger's function."""
    return f"capture_{event}"


def publication(pipeline: str) -> str:
    """Return the name of a pipeline's publication, and of a subscription to it."""
    return f"embedline_{pipeline}"


def index_job(pipeline: str, number: int, precision: str | None = None) -> str:
    """Return the name of pg_cron's job that builds a version's index."""
    return f"{index_jobs(pipeline)}v{number}" + (f" {precision}" if precision else "")


def index_jobs(pipeline: str) -> str:
    """Return how the names of all index jobs of a pipeline begin."""
    return f"embedline index {pipeline} "


def derived(name: str, part: str) -> str:
    """Return the name of an object of derived vectors (readers_derived_dirty)."""
    return generated(name, f"derived_{part}")


def derived_version(number: int) -> str:
    """Return the part of the derived vectors' table of a version (of_v2)."""
    return f"of_v{number}"


def derived_view(name: str) -> str:
    """Return the name of the view over the derived vectors of the serving version."""
    return generated(name, "derived")


def derived_trigger(name: str, event: str) -> str:
    """Return the name of a trigger of derived vectors on events, chunks or vectors."""
    return f"embedline_{name}_derived_{event}"
