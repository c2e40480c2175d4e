"""Take a pipeline's objects off its source, and put them on what it becomes.

PostgreSQL refuses to change a column that a view, a function or a trigger of ours names. So these are taken away, the source
is changed, and they are written again for what it is then, in one transaction: `Reshaping.take_away` and `put_back`. The
change may be an ALTER TABLE of the user's (`alter_source`), another key (`changed_keys`) or another table (`move`).
"""

from __future__ import annotations

from collections.abc import Sequence

from embedline.catalog.load import load_versions
from embedline.catalog.values import Pipeline
from embedline.pipelines.ddl.plan import FUNCTIONS
from embedline.pipelines.ddl.search_functions import ranking_names
from embedline.pipelines.functions import generated_functions
from embedline.pipelines.inputs import PARAMETERS
from embedline.pipelines.reshaped import ReshapedPipeline
from embedline.pipelines.views import view_exists
from embedline.postgres.kept_views import drop_kept, fill, keep_with_dependents, put_back
from embedline.postgres.relations import SEARCH_SCHEMA
from embedline.postgres.session import Session

_RANKING = """
    SELECT p.oid::regprocedure::text AS signature FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
    WHERE n.nspname = $1 AND p.proname = ANY ($2)
"""


class Reshaping:
    """Pipelines whose objects are off their source within a transaction."""

    def __init__(self, session: Session, pipelines: Sequence[Pipeline]) -> None:
        """Read all that must be known of the pipelines before; changes nothing."""
        session.query("SELECT embedline._resolve_attributes()")
        self._session = session
        versions = [version for pipeline in pipelines for version in load_versions(session, pipeline.name)]
        views = [pipeline.view_oid for pipeline in pipelines] + [version.version.view_oid for version in versions]
        there = [oid for oid in views if oid is not None and view_exists(session, oid)]
        self._kept = keep_with_dependents(session, there)
        self._parts = [ReshapedPipeline.of(session, pipeline, self._kept) for pipeline in pipelines]

    def take_away(self, *, ranks_on: bool = False) -> None:
        """Drop the views, those built on them, and the functions that read the source.

        Functions that rank its rows go too, unless `ranks_on`.

        The ranking functions can be replaced in place if the key keeps its type (`ranks_on`). A search that has begun
        has resolved its function, and would not find it again.
        """
        drop_kept(self._session, self._kept)
        doomed = tuple(suffix for suffix in FUNCTIONS if suffix not in PARAMETERS)
        for part in self._parts:
            for version in () if ranks_on else load_versions(self._session, part.pipeline.name):
                for row in self._session.query(_RANKING, ["text", "text[]"], SEARCH_SCHEMA, ranking_names(version)):
                    self._session.execute(f"DROP FUNCTION {row['signature']}")
            for row in generated_functions(self._session, part.pipeline.name, doomed):
                self._session.execute(f"DROP FUNCTION {row['signature']}")

    def put_back(self, source_oid: int, *, reads_again: bool = False) -> None:
        """Write all of it for the source as it is now, or for another table.

        `reads_again` has workers compare each row with what is stored: for a source whose changes were not captured. That
        costs nothing at a provider where the contents are the same.
        """
        session = self._session
        for part in self._parts:
            part.write(source_oid, reads_again=reads_again)
        routed = {part.pipeline.view_oid: part for part in self._parts}
        of_version = {
            version.version.view_oid: (part, version)
            for part in self._parts
            for version in load_versions(session, part.pipeline.name)
        }
        for view in self._kept:
            if view.oid in routed:
                routed[view.oid].put_routing_view_back(view)
            elif view.oid in of_version:
                part, version = of_version[view.oid]
                part.put_version_view_back(view, version)
            else:
                put_back(session, view)
        fill(session, self._kept)
        for part in self._parts:
            part.create_missing_views()
