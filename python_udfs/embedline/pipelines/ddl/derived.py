"""Generate the objects of derived vectors.

    embedline_data.<name>_derived_dirty      subjects to compute again, as applications and workers append them
    embedline_data.<name>_derived_items      items whose vectors have changed, as workers append them
    embedline_data.<name>_derived_subject    one row a subject
    embedline_data.<name>_derived_of_v<n>    its vector, of a version of the pipeline
    embedline_data.<name>_derived_note_*     functions of the triggers on events, chunks and vectors
    embedline_data.<name>_derived_read       a subject's items with their weights, read as the owner of the events
    embedline_search.<name>_derived_of_v<n>  a subject's vector, read with the caller's rights
    embedline_search.<name>_derived_seen     the items that a subject had, read with the caller's rights

An application's write only appends to `dirty`, which has no index. Neither it nor a worker ever waits for the other. A row
of `dirty` without subjects means all of them: of a TRUNCATE, and of a write whose subject could not be told.
"""

from __future__ import annotations

from dataclasses import dataclass

from embedline.catalog.derived import Derived
from embedline.catalog.source import Source
from embedline.core import names
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.pipelines.ddl.functions import DEFINER
from embedline.pipelines.ddl.plan import SourceExpression

EVENTS = ("insert", "update", "delete", "truncate")
TABLES = ("dirty", "items", "subject")
READERS = ("read", "of_items", "all")
# Subjects of one row of `dirty`.
SUBJECTS_PER_ROW = 100
# Weights beyond these count as none: their sums would not fit double precision.
_LEAST_WEIGHT, _MOST_WEIGHT = "1e-100", "1e100"
# Half-lives beyond which an event does not age any more. Its weight is then below the last digit of a newer event's.
_MOST_HALF_LIVES = 200


@dataclass(frozen=True)
class DerivedPlan:
    """All that the generator needs to know of derived vectors.

    `subject_column` is the column's number if the subject is a plain column. `key_types` are those of the pipeline's key.
    """

    derived: Derived
    events: Source
    expressions: dict[str, SourceExpression]
    numbers: dict[str, int]
    key_types: tuple[str, ...]

    @property
    def rows(self) -> str:
        """The events as a FROM item, with the values of the expressions."""
        table = self.events.qualified if self.events.partitioned else f"ONLY {self.events.qualified}"
        weight = self.expressions["weight"].text if "weight" in self.expressions else "1"
        at = self.expressions["at"].text if "at" in self.expressions else "NULL"
        return (
            f"(SELECT ({self.expressions['subject'].text})::{self.derived.subject_type} AS embedline_subject,"
            f" ({self.expressions['item'].text}) AS embedline_item,"
            f" ({weight})::double precision AS embedline_weight, ({at})::timestamptz AS embedline_at FROM {table}) AS e"
        )

    @property
    def item_text(self) -> str:
        """SQL for an item's key in the form in which search returns it."""
        if len(self.key_types) == 1:
            return f"(e.embedline_item)::{self.key_types[0]}::text"
        if self.derived.item_type.endswith("[]"):
            return "to_jsonb((e.embedline_item)::text[])::text"
        return (
            "(e.embedline_item)::jsonb::text"
            if self.derived.item_type in ("json", "jsonb")
            else "(e.embedline_item)::text"
        )

    @property
    def is_one_of_items(self) -> str:
        """SQL condition that an event is of one of the items in the parameter `items`.

        The expression stands alone on its side, so an index over it serves.
        """
        if len(self.key_types) == 1:
            return f"e.embedline_item = ANY (items::{self.key_types[0]}[])"
        wanted = "unnest(items) AS i (item)"
        if self.derived.item_type.endswith("[]"):
            parts = "jsonb_array_elements_text(i.item::jsonb) WITH ORDINALITY AS p (part, place)"
            array = f"ARRAY(SELECT p.part FROM {parts} ORDER BY p.place)::{self.derived.item_type}"
            return f"e.embedline_item = ANY (SELECT {array} FROM {wanted})"
        if self.derived.item_type in ("json", "jsonb"):
            return f"(e.embedline_item)::jsonb = ANY (SELECT i.item::jsonb FROM {wanted})"
        return "e.embedline_item = ANY (items)"


def storage_statements(plan: DerivedPlan) -> list[str]:
    """Return the tables that belong to no version."""
    derived = plan.derived
    dirty, items, subject = (derived.generated(part) for part in TABLES)
    pkey, key = (quote_ident(names.derived(derived.name, part)) for part in ("subject_pkey", "subject_key"))
    vacuumed = (
        "WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,"
        " autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000)"
    )
    return [
        f"CREATE TABLE {dirty} (subjects {derived.subject_type}[], enqueued_at timestamptz NOT NULL DEFAULT now()) {vacuumed}",
        f"COMMENT ON TABLE {dirty} IS 'Subjects to compute again; NULL: all of them'",
        f"CREATE TABLE {items} (items text[] NOT NULL, enqueued_at timestamptz NOT NULL DEFAULT now()) {vacuumed}",
        f"COMMENT ON TABLE {items} IS 'Keys of items whose vectors have changed, in the form in which search returns them'",
        f"""CREATE TABLE {subject} (
            subject_id bigint GENERATED ALWAYS AS IDENTITY,
            subject {derived.subject_type} NOT NULL,
            item_count integer NOT NULL DEFAULT 0,
            event_count bigint NOT NULL DEFAULT 0,
            computed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            CONSTRAINT {pkey} PRIMARY KEY (subject_id),
            CONSTRAINT {key} UNIQUE (subject)
        ) WITH (fillfactor = 80)""",
        f"COMMENT ON TABLE {subject} IS 'Subjects that have events'",
        f"COMMENT ON COLUMN {subject}.item_count IS 'Different items with a vector of the serving version'",
        *(f"REVOKE ALL ON TABLE {table} FROM public" for table in (dirty, items, subject)),
        # They have no key, and a publication of all tables would refuse to delete from them.
        *(f"ALTER TABLE {table} REPLICA IDENTITY FULL" for table in (dirty, items)),
    ]


def version_statements(derived: Derived, number: int, vector_type: str) -> list[str]:
    """Return the table of the vectors of one version."""
    table, name = derived.vectors(number), names.derived(derived.name, names.derived_version(number))
    return [
        f"""CREATE TABLE {table} (
            subject_id bigint NOT NULL CONSTRAINT {quote_ident(name + "_subject_fkey")}
                REFERENCES {derived.generated("subject")} ON DELETE CASCADE,
            embedding {vector_type} NOT NULL,
            CONSTRAINT {quote_ident(name + "_pkey")} PRIMARY KEY (subject_id)
        ) WITH (fillfactor = 80)""",
        f"ALTER TABLE {table} ALTER COLUMN embedding SET STORAGE EXTERNAL",
        f"COMMENT ON TABLE {table} IS 'Derived vectors of version {number} of pipeline {derived.pipeline}'",
        f"REVOKE ALL ON TABLE {table} FROM public",
    ]


def note_function_statements(plan: DerivedPlan) -> list[str]:
    """Return the functions of the triggers.

    They are SECURITY DEFINER, so an application needs no right on our tables. They name the subject's column as text.
    If it has another name by now, all subjects count as changed, and the worker that finds that mark writes the
    functions again. An expression that fails counts as such a change, too.
    """
    dirty, subject = (
        plan.derived.generated("dirty"),
        f"({plan.expressions['subject'].text})::{plan.derived.subject_type}",
    )
    everything = f"INSERT INTO {dirty} (subjects) VALUES (NULL);"
    inputs = [name for name, _ in plan.expressions["subject"].columns]
    is_plain = inputs == [plan.expressions["subject"].text.strip("()").strip('"')]
    columns = " AND ".join(
        f"EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = to_regclass({quote_literal(plan.events.qualified)})"
        f" AND a.attnum = {plan.numbers[name]} AND a.attname = {quote_literal(name)} AND NOT a.attisdropped)"
        for name in inputs
    )
    bodies = {
        event: _guarded(columns, statement, everything, is_plain=is_plain)
        for event, statement in _noting(plan, dirty, subject).items()
    }
    bodies["truncate"] = everything
    bodies["items"] = _noting_items(plan.derived, everything)
    return [
        statement
        for event, body in bodies.items()
        for statement in (
            f"""CREATE OR REPLACE FUNCTION {plan.derived.generated(f"note_{event}")}()
            RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
        AS """
            + quote_literal(f"""
            #variable_conflict use_column
            BEGIN
                {body}
                RETURN NULL;
            END
            """),
            f"REVOKE ALL ON FUNCTION {plan.derived.generated(f'note_{event}')}() FROM public",
        )
    ]


def _noting(plan: DerivedPlan, dirty: str, subject: str) -> dict[str, str]:
    """Return the statements that note the subjects of a write."""

    def note(values: str) -> str:
        return (
            f"INSERT INTO {dirty} (subjects) SELECT array_agg(d.subject)"
            f" FROM (SELECT u.subject, row_number() OVER () AS place FROM (SELECT DISTINCT s.subject FROM ({values}) AS s"
            f" WHERE s.subject IS NOT NULL) AS u) AS d GROUP BY (d.place - 1) / {SUBJECTS_PER_ROW};"
        )

    def of_row(row: str) -> str:
        return f"(SELECT {subject} FROM (SELECT {row}.*) AS embedline_row)"

    def note_row(row: str) -> str:
        return (
            f"INSERT INTO {dirty} (subjects) SELECT ARRAY[r.subject] FROM (SELECT {of_row(row)} AS subject) AS r"
            " WHERE r.subject IS NOT NULL;"
        )

    if uses_row_triggers(plan.events):
        changes = {"insert": note_row("NEW"), "delete": note_row("OLD")}
    else:
        changes = {
            event: note(f"SELECT {subject} AS subject FROM {rows}")
            for event, rows in (("insert", "new_rows"), ("delete", "old_rows"))
        }
    changes["update"] = (
        f"INSERT INTO {dirty} (subjects) SELECT CASE WHEN r.old = r.new THEN ARRAY[r.new]"
        " ELSE array_remove(ARRAY[r.old, r.new], NULL) END"
        f" FROM (SELECT {of_row('OLD')} AS old, {of_row('NEW')} AS new) AS r WHERE r.old IS NOT NULL OR r.new IS NOT NULL;"
    )
    return changes


def _guarded(columns: str, statement: str, everything: str, *, is_plain: bool) -> str:
    """Return a statement in which an expression's error fails no write.

    A plain column has none, and spares each statement a subtransaction.
    """
    if not is_plain:
        statement = f"BEGIN {statement} EXCEPTION WHEN OTHERS OR assert_failure THEN {everything} END;"
    return f"IF {columns or 'true'} THEN {statement} ELSE {everything} END IF;"


def _noting_items(derived: Derived, everything: str) -> str:
    """Return the body of the function that notes items.

    It runs for a chunk set (no argument), or for a version (its argument is the table of its chunks).

    It asks for the key's columns, because the pipeline may follow another key.
    """
    return f"""
        DECLARE
            keys text;
        BEGIN
            IF TG_OP = 'TRUNCATE' THEN
                {everything}
                RETURN NULL;
            END IF;
            SELECT CASE WHEN cardinality(p.key_columns) = 1 THEN min(format('c.%I::text', k.name))
                ELSE format('jsonb_build_array(%s)::text', string_agg(format('c.%I::text', k.name), ', ' ORDER BY k.place)) END
            INTO keys FROM embedline.pipeline AS p, unnest(p.key_columns) WITH ORDINALITY AS k (name, place)
            WHERE p.pipeline_id = {derived.pipeline_id} GROUP BY p.key_columns;
            EXECUTE format(
                'INSERT INTO {derived.generated("items")} (items) SELECT array_agg(d.item) FROM ('
                'SELECT u.item, row_number() OVER () AS place FROM (SELECT DISTINCT %s AS item FROM changed AS %s) AS u'
                ') AS d GROUP BY (d.place - 1) / {SUBJECTS_PER_ROW}',
                keys, CASE WHEN TG_NARGS = 0 THEN 'c'
                    ELSE 'v JOIN ' || TG_ARGV[0] || ' AS c ON c.chunk_id = v.chunk_id' END);
        END;"""


def uses_row_triggers(events: Source) -> bool:
    """Return True if statement triggers would not see all writes of the events."""
    return events.partitioned or events.subscribed or events.is_child


def trigger_statements(plan: DerivedPlan) -> list[str]:
    """Return the triggers on the events.

    Each takes SHARE ROW EXCLUSIVE on them for an instant.
    """
    table = plan.events.qualified
    insert, delete = (
        ("FOR EACH ROW", "FOR EACH ROW")
        if uses_row_triggers(plan.events)
        else (
            "REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT",
            "REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT",
        )
    )
    inputs = dict.fromkeys(name for expression in plan.expressions.values() for name, _ in expression.columns)
    # As text and byte by byte, as capture compares: some types have no equality.
    changed = " OR ".join(
        f'(OLD.{quote_ident(name)}::text COLLATE "C") IS DISTINCT FROM (NEW.{quote_ident(name)}::text COLLATE "C")'
        for name in inputs
    )
    clauses = {
        "insert": f"AFTER INSERT ON {table} {insert}",
        "delete": f"AFTER DELETE ON {table} {delete}",
        "update": f"AFTER UPDATE ON {table} FOR EACH ROW WHEN ({changed})",
        "truncate": f"AFTER TRUNCATE ON {table} FOR EACH STATEMENT",
    }
    statements = []
    for event, clause in clauses.items():
        name, function = (
            quote_ident(names.derived_trigger(plan.derived.name, event)),
            plan.derived.generated(f"note_{event}"),
        )
        statements.append(f"CREATE OR REPLACE TRIGGER {name} {clause} EXECUTE FUNCTION {function}()")
        if plan.events.subscribed:
            statements.append(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {name}")
    return statements


def item_trigger_statements(derived: Derived, chunk: str, vectors: str) -> list[str]:
    """Return the triggers on a chunk set and on the vectors of a version.

    A chunk that is deleted takes its vector along, and knows its key. All writes of both are workers'.
    """
    function = derived.generated("note_items")
    of_version = f"{function}({quote_literal(chunk).strip()})"
    clauses = [
        (
            "items_delete",
            f"AFTER DELETE ON {chunk} REFERENCING OLD TABLE AS changed FOR EACH STATEMENT",
            f"{function}()",
        ),
        ("items_truncate", f"AFTER TRUNCATE ON {chunk} FOR EACH STATEMENT", f"{function}()"),
        ("items_insert", f"AFTER INSERT ON {vectors} REFERENCING NEW TABLE AS changed FOR EACH STATEMENT", of_version),
        ("items_update", f"AFTER UPDATE ON {vectors} REFERENCING NEW TABLE AS changed FOR EACH STATEMENT", of_version),
        ("items_remove", f"AFTER DELETE ON {vectors} REFERENCING OLD TABLE AS changed FOR EACH STATEMENT", of_version),
    ]
    return [
        f"CREATE OR REPLACE TRIGGER {quote_ident(names.derived_trigger(derived.name, event))} {clause} EXECUTE FUNCTION {call}"
        for event, clause, call in clauses
    ]


def reader_statements(plan: DerivedPlan) -> list[str]:
    """Return the functions that read the events as their owner.

    A weight is relative to that of the subject's newest event. With one half-life for all, time multiplies all weights of
    a subject by the same factor. So neither the mean nor its direction depends on now.
    """
    derived = plan.derived
    subject_type = derived.subject_type
    known = f"e.embedline_item IS NOT NULL AND abs(e.embedline_weight) BETWEEN {_LEAST_WEIGHT} AND {_MOST_WEIGHT}" + (
        "" if derived.half_life is None else " AND isfinite(e.embedline_at)"
    )
    age = "extract(epoch FROM x.newest - x.at)::double precision"
    aged = (
        "x.weight"
        if derived.half_life is None
        else f"x.weight * power(2::double precision, -least({age} / {derived.half_life!r}::double precision, {_MOST_HALF_LIVES}))"
    )
    return [
        f"""CREATE OR REPLACE FUNCTION {derived.generated("read")}(subjects {subject_type}[])
        RETURNS TABLE (ordinality bigint, item text, weight double precision, event_count bigint)
        LANGUAGE sql STABLE {DEFINER}
        BEGIN ATOMIC
        SELECT x.ordinality, x.item, sum({aged}), count(*) FROM (
            SELECT w.ordinality, {plan.item_text} AS item, e.embedline_weight AS weight, e.embedline_at AS at,
                max(e.embedline_at) OVER (PARTITION BY w.ordinality) AS newest
            FROM unnest(subjects) WITH ORDINALITY AS w (subject, ordinality)
            JOIN {plan.rows} ON e.embedline_subject = w.subject WHERE {known}
        ) AS x GROUP BY x.ordinality, x.item;
        END""",
        f"""CREATE OR REPLACE FUNCTION {derived.generated("of_items")}(items text[])
        RETURNS SETOF {subject_type} LANGUAGE sql STABLE {DEFINER}
        BEGIN ATOMIC
        SELECT DISTINCT e.embedline_subject FROM {plan.rows}
        WHERE e.embedline_subject IS NOT NULL AND {plan.is_one_of_items};
        END""",
        f"""CREATE OR REPLACE FUNCTION {derived.generated("all")}()
        RETURNS SETOF {subject_type} LANGUAGE sql STABLE {DEFINER}
        BEGIN ATOMIC
        SELECT DISTINCT e.embedline_subject FROM {plan.rows} WHERE e.embedline_subject IS NOT NULL;
        END""",
    ]


def seen_statement(plan: DerivedPlan) -> str:
    """Return the function that lists a subject's items with the caller's rights."""
    return f"""CREATE OR REPLACE FUNCTION {plan.derived.search_function("seen")}(wanted {plan.derived.subject_type})
        RETURNS SETOF text LANGUAGE sql STABLE PARALLEL SAFE
        BEGIN ATOMIC
        SELECT DISTINCT {plan.item_text} FROM {plan.rows} WHERE e.embedline_subject = wanted AND e.embedline_item IS NOT NULL;
        END"""


def vector_function_statement(plan: DerivedPlan, number: int, vector: str) -> str:
    """Return the function that gives a subject's vector.

    Its caller must be able to read one of the subject's events.
    """
    derived = plan.derived
    return f"""CREATE OR REPLACE FUNCTION {derived.search_function(names.derived_version(number))}(wanted {derived.subject_type})
        RETURNS {vector} LANGUAGE sql STABLE PARALLEL SAFE
        BEGIN ATOMIC
        SELECT v.embedding FROM {derived.generated("subject")} AS s JOIN {derived.vectors(number)} AS v USING (subject_id)
        WHERE s.subject = wanted AND EXISTS (SELECT FROM {plan.rows} WHERE e.embedline_subject = wanted);
        END"""


def view_query(plan: DerivedPlan, number: int, vector: str) -> str:
    """Return the query of the view over the vectors of a version.

    It shows subjects of whom the caller may read an event.
    """
    derived = plan.derived
    return (
        f"SELECT s.subject, v.embedding::{vector} AS embedding, s.item_count, s.event_count, s.computed_at"
        f" FROM {derived.generated('subject')} AS s JOIN {derived.vectors(number)} AS v USING (subject_id)"
        f" WHERE EXISTS (SELECT FROM {plan.rows} WHERE e.embedline_subject = s.subject)"
    )
