"""Name the tables that a pipeline publishes.

One of them, the table of published versions, is defined here.
"""

from __future__ import annotations

from embedline.catalog.load import load_versions
from embedline.catalog.values import Pipeline
from embedline.pipelines import published
from embedline.postgres.session import Session

# One row for each published version. `model_fingerprint` and `query_prefix` are what a reader that embeds queries itself
# must have in common with the version.
ROUTING_COLUMNS = """
    version integer PRIMARY KEY,
    serves boolean NOT NULL,
    model text NOT NULL,
    query_prefix text NOT NULL,
    model_fingerprint text NOT NULL,
    fingerprint text NOT NULL,
    dimensions integer NOT NULL,
    column_type text NOT NULL,
    distance text NOT NULL
"""


def routing_statements(name: str) -> list[str]:
    """Return the statements that create the table of published versions."""
    table = published.routing_table(name)
    return [
        f"CREATE TABLE {table} ({ROUTING_COLUMNS})",
        f"COMMENT ON TABLE {table} IS 'Published versions: a subscriber shows the one that serves'",
        f"REVOKE ALL ON TABLE {table} FROM public",
    ]


def version_tables(session: Session, name: str) -> list[str]:
    """Return the generated tables that a subscriber needs.

    They are those of routing, hidden keys, chunks, and the vectors of all versions.
    """
    versions = load_versions(session, name)
    chunks = [table for version in versions for table in (version.chunk, version.vectors)]
    return list(dict.fromkeys([published.routing_table(name), versions[0].generated("hidden"), *chunks]))


def source_is_published(session: Session, pipeline: Pipeline) -> bool:
    """Return True if the pipeline's publication holds its source.

    The source that the pipeline had before it moved counts, too.
    """
    return any(not table.is_generated for table in published.published_tables(session, pipeline.name))
