"""Define derived vectors as values, and read them from the catalogue."""

from __future__ import annotations

import json
from dataclasses import dataclass

from embedline.core import names
from embedline.errors import NotFound
from embedline.postgres.relations import SEARCH_SCHEMA, data_name
from embedline.postgres.session import Session

_COLUMNS = """
    d.derived_id, d.name, d.pipeline_id, p.name AS pipeline, d.events::oid::bigint AS events_oid, d.event_columns,
        d.subject_expression, d.item_expression, d.weight_expression, d.at_expression, d.expression_search_path,
        d.subject_type, d.item_type, extract(epoch FROM d.half_life)::double precision AS half_life,
        d.derived_view::oid::bigint AS view_oid
"""
_TABLES = "FROM embedline.derived AS d JOIN embedline.pipeline AS p ON p.pipeline_id = d.pipeline_id"
# Readers, who search, may not read the words of an error.
_DERIVED = f"SELECT {_COLUMNS}, NULL::text AS last_error {_TABLES}"
_BY_NAME = f"{_DERIVED} WHERE d.name = $1"
_EVERY_OF_PIPELINE = f"{_DERIVED} WHERE p.name = $1 ORDER BY d.derived_id"
# Of tables of events that are there: DROP TABLE ... CASCADE takes our functions along.
_IS_THERE = "EXISTS (SELECT FROM pg_class AS c WHERE c.oid = d.events)"
_OF_PIPELINE = f"{_DERIVED} WHERE p.name = $1 AND {_IS_THERE} ORDER BY d.derived_id"
_ACTIVE = f"""
    SELECT {_COLUMNS}, d.last_error {_TABLES}
    WHERE p.state = 'active' AND ($1 IS NULL OR p.name = $1) AND {_IS_THERE} ORDER BY d.derived_id
"""


@dataclass(frozen=True)
class Derived:
    """A row of embedline.derived; see the comments of its columns.

    `half_life` is in seconds.
    """

    derived_id: int
    name: str
    pipeline_id: int
    pipeline: str
    events_oid: int
    event_columns: dict[int, str]
    expressions: dict[str, str]
    search_path: str
    subject_type: str
    item_type: str
    half_life: float | None
    view_oid: int | None
    last_error: str | None = None

    def generated(self, part: str) -> str:
        """Return the qualified, quoted name of a generated table or function."""
        return data_name(names.derived(self.name, part))

    def vectors(self, number: int) -> str:
        """Return the table of the vectors of a version of the pipeline."""
        return self.generated(names.derived_version(number))

    def search_function(self, part: str) -> str:
        """Return the qualified name of a function that callers' searches use."""
        return f'{SEARCH_SCHEMA}."{names.derived(self.name, part)}"'


def load_derived(session: Session, name: str) -> Derived:
    """Return derived vectors by name; raise NotFound."""
    rows = session.query(_BY_NAME, ["text"], name)
    if not rows:
        raise NotFound(f'there are no derived vectors "{name}"', hint="SELECT name FROM embedline.derived_status;")
    return _derived(rows[0])


def derived_of(session: Session, pipeline: str) -> list[Derived]:
    """Return the derived vectors of a pipeline whose events are there."""
    return [_derived(row) for row in session.query(_OF_PIPELINE, ["text"], pipeline)]


def every_derived_of(session: Session, pipeline: str) -> list[Derived]:
    """Return the derived vectors of a pipeline, also of events that were dropped."""
    return [_derived(row) for row in session.query(_EVERY_OF_PIPELINE, ["text"], pipeline)]


def active_derived(session: Session, pipeline: str | None) -> list[Derived]:
    """Return the derived vectors that workers keep, of one pipeline or of all."""
    return [_derived(row) for row in session.query(_ACTIVE, ["text"], pipeline)]


def _derived(row: dict[str, object]) -> Derived:
    expressions = {name: row[f"{name}_expression"] for name in ("subject", "item", "weight", "at")}
    columns = row["event_columns"]
    return Derived(
        derived_id=int(str(row["derived_id"])), name=str(row["name"]), pipeline_id=int(str(row["pipeline_id"])),
        pipeline=str(row["pipeline"]), events_oid=int(str(row["events_oid"])),
        event_columns={int(k): str(v) for k, v in json.loads(str(columns)).items()},
        expressions={name: str(text) for name, text in expressions.items() if text is not None},
        search_path=str(row["expression_search_path"]), subject_type=str(row["subject_type"]),
        item_type=str(row["item_type"]),
        half_life=None if row["half_life"] is None else float(str(row["half_life"])),
        view_oid=None if row["view_oid"] is None else int(str(row["view_oid"])),
        last_error=None if row["last_error"] is None else str(row["last_error"]),
    )  # fmt: skip
