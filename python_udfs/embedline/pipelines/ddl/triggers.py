"""SQL text of the capture triggers and their functions."""

from __future__ import annotations

from embedline.core import names
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.pipelines.ddl.plan import CapturePlan
from embedline.postgres.relations import data_name


def trigger_function_statements(plan: CapturePlan) -> list[str]:
    """Return the trigger functions.

    They are SECURITY DEFINER, so an application role needs no right on our tables.

    They run as Embedline's owner. If a column has another type by now, a function of the source's owner may cast it.
    So they check the types first.
    """
    bodies = _statement_bodies(plan) if plan.capture == "statement" else _row_bodies(plan)
    changed = " OR ".join(_differs(key.source_name) for key in plan.keys)
    inputs = ", ".join(f"{row}.{quote_ident(name)}" for row in ("OLD", "NEW") for name, _ in plan.expression_columns)
    # to_regtype: NULL for a type that has another name now. Then, as with a type that is not known, the row counts as changed.
    known = " AND ".join(
        f"pg_typeof(OLD.{quote_ident(name)}) = to_regtype({quote_literal(column_type)})" if column_type else "false"
        for name, column_type in plan.expression_columns
    )
    bodies["update"] = f"""
        IF {changed} THEN
            {plan.enqueue_row("OLD", "deleted")}
            {_hide_row(plan)}
        ELSIF {known or "false"} THEN
            -- Within: the planner may evaluate a cast of what stands in one expression with its condition.
            IF NOT {plan.generated("changed")}({inputs}) THEN
                RETURN NULL;
            END IF;
            -- A search_path that an expression of the owner's has set would outlive it.
            IF pg_catalog.current_setting('search_path') OPERATOR(pg_catalog.<>) 'pg_catalog, pg_temp' THEN
                PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
            END IF;
        END IF;
        {plan.enqueue_row("NEW")}
        RETURN NULL;"""
    of_statement = plan.capture == "statement"
    for event, row, rows in (("insert", "NEW", "new_rows"), ("update", "OLD", None), ("delete", "OLD", "old_rows")):
        bodies[event] = _type_guard(plan, row, rows if of_statement else None) + bodies[event]
    emptied = ("inbox", "deleted", "hidden", "lent", "outbox", "document")
    tables = ", ".join([*(plan.generated(suffix) for suffix in emptied), *plan.chunk_tables])
    listed = ", ".join(quote_ident(key.name) for key in plan.keys)
    bodies["truncate"] = f"""
        IF NOT {_OLD_SNAPSHOT} THEN
            -- Rows that are loaded again pay for nothing. 50,000 keys took 0.1 s.
            {plan.enqueue(listed, plan.generated("document"), "deleted")}
            RETURN NULL;
        END IF;
        -- An old snapshot may not see which documents there are.
        TRUNCATE {tables} CASCADE;
        RETURN NULL;"""
    return [
        statement
        for event, body in bodies.items()
        for statement in (
            f"""CREATE OR REPLACE FUNCTION {plan.generated(names.capture_suffix(event))}()
            RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
        AS """
            + quote_literal(f"""
            BEGIN{body}
            END
            """),
            f"REVOKE ALL ON FUNCTION {plan.generated(names.capture_suffix(event))}() FROM public",
        )
    ]


def resting_trigger_statements(name: str) -> list[str]:
    """Return trigger functions that capture nothing.

    They are for a source that has lost its key: a write must not fail because of that.
    """
    return [
        f"CREATE OR REPLACE FUNCTION {data_name(names.generated(name, names.capture_suffix(event)))}() RETURNS trigger"
        " LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS 'BEGIN RETURN NULL; END'"
        for event in ("insert", "update", "delete")
    ]


def _type_guard(plan: CapturePlan, row: str, rows: str | None) -> str:
    """Return the test that a key has the types that it is cast to.

    It is of one row, or of a transition table's rows. Domains over the types pass.
    """
    row = "r" if rows else row
    other = " OR ".join(
        f"pg_typeof({row}.{quote_ident(key.source_name)}) <> {wanted}"
        f" AND NOT embedline._is_type(pg_typeof({row}.{quote_ident(key.source_name)}), {wanted})"
        for key in plan.keys
        for wanted in [f"{quote_literal(key.type).strip()}::regtype"]
    )
    condition = f"(SELECT {other} FROM {rows} AS {row} LIMIT 1)" if rows else other
    return f"""
        IF {condition} THEN
            RAISE WARNING 'a key column of {{}} has another type than pipeline "{plan.name}" was made for: nothing is captured'
                USING HINT = 'SELECT embedline.refresh_pipeline(''{plan.name}'');';
            RETURN NULL;
        END IF;""".replace("{}", plan.source.replace("'", "''").replace("%", "%%"))


def _statement_bodies(plan: CapturePlan) -> dict[str, str]:
    variables = [quote_ident(f"found_{i + 1}") for i in range(len(plan.keys))]
    found = ", ".join(f"array_agg(d.{quote_ident(key.name)})" for key in plan.keys)
    declared = " ".join(f"{name} {key.type}[];" for name, key in zip(variables, plan.keys, strict=True))
    listed = ", ".join(variables)
    same = " AND ".join(
        f"d.{quote_ident(key.name)} = n.{quote_ident(key.source_name)}::{key.type}" for key in plan.keys
    )
    return {
        # A row may come under the key of a deleted one whose chunks still stand: these must not be shown with it.
        # Large loads search for such rows only while deleted keys wait. 50,000 rows beside 1,000,000 documents cost
        # 1.3 times the bare insert without the search, 1.9 times with it. A look-up for each row, because the first
        # statement of a session decides the plan for all later ones. An old snapshot may see neither the deletion nor
        # which chunks stand: there all new rows are hidden until a worker has compared them.
        "insert": f"""
        {plan.enqueue(plan.keys_of_row("n"), "new_rows AS n")}
        IF {_OLD_SNAPSHOT} THEN
            INSERT INTO {plan.generated("hidden")} ({plan.key_names}) SELECT {plan.keys_of_row("n")} FROM new_rows AS n;
        ELSIF NOT EXISTS (SELECT FROM new_rows OFFSET {_FEW_ROWS}) OR EXISTS (SELECT FROM {plan.generated("deleted")}) THEN
            DECLARE
                {declared}
            BEGIN
                SELECT {found} INTO {listed} FROM new_rows AS n CROSS JOIN LATERAL (
                    SELECT {plan.key_names} FROM {plan.generated("document")} AS d
                    WHERE {same} AND d.state = 'embedded' LIMIT 1) AS d;
                IF {variables[0]} IS NOT NULL THEN
                    {_hide(plan, listed)}
                END IF;
            END;
        END IF;
        RETURN NULL;""",
        # Only appended: removing the chunks of 20,000 rows here took 30 times as long as the bare DELETE. They cannot be seen
        # from now on, because every view and search joins the live row. A worker removes them.
        "delete": f"""
        {plan.enqueue(plan.keys_of_row("o"), "old_rows AS o", "deleted")}
        RETURN NULL;""",
    }


# Rows of an INSERT up to which their keys are looked up in any case.
_FEW_ROWS = 100
_OLD_SNAPSHOT = "current_setting('transaction_isolation') IN ('repeatable read', 'serializable')"


def _hide(plan: CapturePlan, arrays: str) -> str:
    """Return the statement that hides the chunks of keys, given as arrays.

    Chunks that are exactly those of their row stay shown.

    An error of the owner's expressions hides them all: the application's write goes through.
    """
    hidden = plan.generated("hidden")
    return f"""
        BEGIN
            INSERT INTO {hidden} ({plan.key_names}) SELECT * FROM {plan.generated("foreign")}({arrays});
        EXCEPTION WHEN OTHERS OR assert_failure THEN
            INSERT INTO {hidden} ({plan.key_names}) SELECT * FROM unnest({arrays});
        END;
        -- A search_path that an expression of the owner's has set would outlive it.
        IF pg_catalog.current_setting('search_path') OPERATOR(pg_catalog.<>) 'pg_catalog, pg_temp' THEN
            PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
        END IF;"""


def _hide_row(plan: CapturePlan) -> str:
    """Return the statement that hides stored chunks under a new row's key.

    The trigger of INSERT does the same for a statement.
    """
    key = " AND ".join(
        f"d.{quote_ident(key.name)} = NEW.{quote_ident(key.source_name)}::{key.type}" for key in plan.keys
    )
    return f"""
        IF {_OLD_SNAPSHOT} THEN
            INSERT INTO {plan.generated("hidden")} ({plan.key_names}) VALUES ({plan.keys_of_row("NEW")});
        ELSIF EXISTS (SELECT FROM {plan.generated("document")} AS d WHERE {key} AND d.state = 'embedded') THEN
            {_hide(plan, plan.key_arrays_of_row("NEW"))}
        END IF;"""


def _row_bodies(plan: CapturePlan) -> dict[str, str]:
    # A row that moves between partitions is deleted and inserted: the worker finds it unchanged and pays nothing.
    return {
        "insert": f"""
        {plan.enqueue_row("NEW")}
        {_hide_row(plan)}
        RETURN NULL;""",
        "delete": f"""
        {plan.enqueue_row("OLD", "deleted")}
        RETURN NULL;""",
    }


def _differs(column: str) -> str:
    # As text and byte by byte: some types have no equality (json), and equal is not the same (numeric 1.0 and 1.00, citext).
    name = quote_ident(column)
    return f'(OLD.{name}::text COLLATE "C") IS DISTINCT FROM (NEW.{name}::text COLLATE "C")'


def trigger_statements(plan: CapturePlan) -> list[str]:
    """Return the triggers on the source.

    CREATE TRIGGER takes SHARE ROW EXCLUSIVE on it for an instant.
    """
    if plan.capture == "statement":
        insert, delete = (
            "REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT",
            "REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT",
        )
    else:
        insert = delete = "FOR EACH ROW"
    return [
        *_trigger(plan, "insert", f"AFTER INSERT ON {plan.source} {insert}"),
        *_trigger(plan, "delete", f"AFTER DELETE ON {plan.source} {delete}"),
        *update_trigger_statements(plan),
        *_trigger(plan, "truncate", f"AFTER TRUNCATE ON {plan.source} FOR EACH STATEMENT"),
    ]


def update_trigger_statements(plan: CapturePlan) -> list[str]:
    """The trigger that names the input columns."""
    columns = "" if plan.watch_all else f" OF {', '.join(map(quote_ident, plan.input_columns))}"
    condition = " OR ".join(_differs(name) for name in plan.input_columns)
    return _trigger(plan, "update", f"AFTER UPDATE{columns} ON {plan.source} FOR EACH ROW WHEN ({condition})")


def _trigger(plan: CapturePlan, event: str, clause: str) -> list[str]:
    name = quote_ident(names.trigger(plan.name, event))
    create = (
        f"CREATE OR REPLACE TRIGGER {name} {clause} EXECUTE FUNCTION {plan.generated(names.capture_suffix(event))}()"
    )
    return [create, *([f"ALTER TABLE {plan.source} ENABLE ALWAYS TRIGGER {name}"] if plan.always else [])]
