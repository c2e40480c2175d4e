"""Generate the functions by which verify and the closing sweep read a source."""

from __future__ import annotations

from embedline.core.sql_text import quote_ident, quote_literal
from embedline.pipelines.ddl.functions import DEFINER, content_hash_sql
from embedline.pipelines.ddl.plan import CapturePlan, SourceExpression


def audit_function_statements(plan: CapturePlan) -> list[str]:
    """Return the statements of a pipeline's audit functions.

    They call the content and filter functions, which must exist.
    """
    return [
        _digest_statement(plan), _missing_statement(plan), _audit_statement(plan), _gone_statement(plan),
        _present_statement(plan), _foreign_statement(plan),
    ]  # fmt: skip


def _missing_statement(plan: CapturePlan) -> str:
    """Return the function of a backfill's closing sweep.

    An update that moved a row to a block already read was not captured.

    Such a row has no document or, while rows are read again, an earlier one. That one was cut by another recipe, by
    another model, or from the content and filter before an alteration. Only of the last kind is the content computed,
    so that the sweep of rows that are as they should be costs one join.
    """
    accepted = f"coalesce({plan.call('filter', plan.filter, 'source_row')}, false)" if plan.filter else "true"
    inputs = ", ".join(f"source_row.{quote_ident(name)}" for name, _ in plan.expression_columns)
    keys = ", ".join(f"source_row.{quote_ident(key.source_name)} AS {quote_ident(key.name)}" for key in plan.keys)
    return f"""CREATE OR REPLACE FUNCTION {plan.generated("missing")}(
            row_limit integer, wanted_recipe integer, valid_from timestamptz, altered_at timestamptz)
        RETURNS TABLE ({_key_definitions(plan)})
        LANGUAGE sql STABLE {DEFINER}
        BEGIN ATOMIC
        SELECT r.* FROM (
            SELECT {keys} FROM {plan.rows} AS source_row
            LEFT JOIN {plan.generated("document")} AS d ON {_same_source_key(plan, "d")}
            WHERE CASE
                    WHEN d.state IS NULL THEN {accepted}
                    WHEN d.recipe <> $2 OR (d.state = 'embedded' AND d.embedded_at < $3) THEN true
                    WHEN d.embedded_at < $4
                        THEN coalesce(d.content_hash, ''::bytea) IS DISTINCT FROM {plan.generated("digest")}({inputs})
                    ELSE false
                END
        ) AS r
        WHERE {_not_queued(plan, "r")}
        LIMIT $1;
        END"""


def _digest_statement(plan: CapturePlan) -> str:
    """Return the function that tells what must be stored of a row.

    NULL if the filter refuses it, no bytes without content, else the content's hash.

    One byte says that an expression raises: a single poison row must not end the audit of a million. The block with its
    exception handler costs about 1 µs a row.
    """
    columns = plan.expression_columns
    parameters = ", ".join(f"input_{i + 1} {column_type}" for i, (_, column_type) in enumerate(columns))
    prefix = _call(plan, "prefix", plan.prefix) if plan.prefix else "NULL::text"
    digest = content_hash_sql(plan, _call(plan, "content", plan.content), prefix)
    refused = f"IF {_call(plan, 'filter', plan.filter)} IS NOT TRUE THEN RETURN NULL; END IF;" if plan.filter else ""
    return f"""CREATE OR REPLACE FUNCTION {plan.generated("digest")}({parameters})
        RETURNS bytea LANGUAGE plpgsql STABLE
        AS """ + quote_literal(f"""
        BEGIN
            {refused}
            RETURN coalesce({digest}, '');
        EXCEPTION WHEN OTHERS OR assert_failure THEN
            RETURN decode('00', 'hex');
        END
        """)


def _call(plan: CapturePlan, suffix: str, expression: SourceExpression) -> str:
    places = {name: i + 1 for i, (name, _) in enumerate(plan.expression_columns)}
    return f"{plan.expression(suffix)}({', '.join(f'input_{places[name]}' for name, _ in expression.columns)})"


def _audit_statement(plan: CapturePlan) -> str:
    """Return the function that finds rows which are not stored as they should be.

    Queued rows are left out. One statement, one snapshot.

    OFFSET 0 keeps the digest from being computed once for each time that the CASE names it.
    """
    keys = ", ".join(
        f"source_row.{quote_ident(key.source_name)}::{key.type} AS {quote_ident(key.name)}" for key in plan.keys
    )
    inputs = ", ".join(f"source_row.{quote_ident(name)}" for name, _ in plan.expression_columns)
    join = _same_key(plan, "d", "r")
    selected = ", ".join(f"r.{quote_ident(key.name)}" for key in plan.keys)
    return f"""CREATE OR REPLACE FUNCTION {plan.generated("audit")}(wanted_recipe integer, valid_from timestamptz)
        RETURNS TABLE (finding text, {_key_definitions(plan)})
        LANGUAGE sql STABLE {DEFINER}
        BEGIN ATOMIC
        SELECT f.* FROM (
            SELECT CASE
                    WHEN d.state IS NULL THEN CASE WHEN r.digest IS NOT NULL THEN 'missing' END
                    WHEN r.digest IS NULL THEN 'filtered_out'
                    -- A dead row without a hash failed before its content was known: nothing to compare.
                    WHEN d.content_hash IS DISTINCT FROM nullif(r.digest, ''::bytea)
                        AND (d.state <> 'dead' OR d.content_hash IS NOT NULL) THEN 'stale'
                    WHEN d.state = 'embedded' AND (d.recipe <> $1 OR d.embedded_at < $2) THEN 'outdated'
                END AS finding, {selected}
            FROM (
                SELECT {keys}, {plan.generated("digest")}({inputs}) AS digest FROM {plan.rows} AS source_row OFFSET 0
            ) AS r
            LEFT JOIN {plan.generated("document")} AS d ON {join}
        ) AS f
        WHERE f.finding IS NOT NULL AND {_not_queued(plan, "f")};
        END"""


def _gone_statement(plan: CapturePlan) -> str:
    """Return the function that finds documents without a row.

    Queued ones are left out. It gives the time of their last write.
    """
    selected = ", ".join(f"d.{quote_ident(key.name)}" for key in plan.keys)
    return f"""CREATE OR REPLACE FUNCTION {plan.generated("gone")}()
        RETURNS TABLE ({_key_definitions(plan)}, embedded_at timestamptz)
        LANGUAGE sql STABLE {DEFINER}
        BEGIN ATOMIC
        SELECT {selected}, d.embedded_at FROM {plan.generated("document")} AS d
        WHERE NOT EXISTS (SELECT FROM {plan.rows} AS source_row WHERE {_same_source_key(plan, "d")})
            AND {_not_queued(plan, "d")};
        END"""


def _present_statement(plan: CapturePlan) -> str:
    """Return the function that tells which keys have a row now.

    VOLATILE: its snapshot is newer than its caller's.
    """
    arrays = ", ".join(f"{quote_ident(key.name)} {key.type}[]" for key in plan.keys)
    selected = ", ".join(f"wanted.{quote_ident(key.name)}" for key in plan.keys)
    parameters = ", ".join(f"${i + 1}" for i in range(len(plan.keys)))
    return f"""CREATE OR REPLACE FUNCTION {plan.generated("present")}({arrays})
        RETURNS TABLE ({", ".join(f"present_{i + 1} {key.type}" for i, key in enumerate(plan.keys))})
        LANGUAGE sql VOLATILE {DEFINER}
        BEGIN ATOMIC
        SELECT {selected} FROM unnest({parameters}) AS wanted ({plan.key_names})
        WHERE EXISTS (SELECT FROM {plan.rows} AS source_row WHERE {_same_source_key(plan, "wanted")});
        END"""


def _foreign_statement(plan: CapturePlan) -> str:
    """Return the function that tells which keys have chunks of another row.

    VOLATILE, as _present_statement.
    """
    arrays = ", ".join(f"{quote_ident(key.name)} {key.type}[]" for key in plan.keys)
    selected = ", ".join(f"wanted.{quote_ident(key.name)}" for key in plan.keys)
    parameters = ", ".join(f"${i + 1}" for i in range(len(plan.keys)))
    inputs = ", ".join(f"source_row.{quote_ident(name)}" for name, _ in plan.expression_columns)
    return f"""CREATE OR REPLACE FUNCTION {plan.generated("foreign")}({arrays})
        RETURNS TABLE ({", ".join(f"foreign_{i + 1} {key.type}" for i, key in enumerate(plan.keys))})
        LANGUAGE sql VOLATILE {DEFINER}
        BEGIN ATOMIC
        SELECT {selected} FROM unnest({parameters}) AS wanted ({plan.key_names})
        JOIN {plan.generated("document")} AS d ON {_same_key(plan, "d", "wanted")}
        LEFT JOIN {plan.rows} AS source_row ON {_same_source_key(plan, "wanted")}
        WHERE CASE WHEN source_row.{quote_ident(plan.keys[0].source_name)} IS NULL THEN true
            ELSE d.content_hash IS DISTINCT FROM {plan.generated("digest")}({inputs}) END;
        END"""


def _key_definitions(plan: CapturePlan) -> str:
    return ", ".join(f"{quote_ident(key.name)} {key.type}" for key in plan.keys)


def _same_key(plan: CapturePlan, left: str, right: str) -> str:
    return " AND ".join(f"{left}.{quote_ident(key.name)} = {right}.{quote_ident(key.name)}" for key in plan.keys)


def _same_source_key(plan: CapturePlan, other: str) -> str:
    return " AND ".join(
        f"source_row.{quote_ident(key.source_name)} = {other}.{quote_ident(key.name)}" for key in plan.keys
    )


def _not_queued(plan: CapturePlan, alias: str) -> str:
    """Return the condition that a key is not queued.

    It is neither in the outbox, the inbox or the deleted keys, nor in a claim, which stands until all of its keys are done.
    """
    taken = ", ".join(f"i.{quote_ident(key.name)}" for key in plan.keys)
    same = _same_key(plan, "q", alias)
    return f"NOT EXISTS (SELECT FROM {plan.generated('outbox')} AS q WHERE {same})" + "".join(
        f" AND NOT EXISTS (SELECT FROM {plan.generated(table)} AS i"
        f" CROSS JOIN LATERAL unnest({taken}) AS q ({plan.key_names}) WHERE {same})"
        for table in ("inbox", "deleted", "claim")
    )
