"""SQL text of the functions that read a source: content, hash, tenant, ranges."""

from __future__ import annotations

from embedline.core.media import MAX_MEDIA_BYTES
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.pipelines.ddl.plan import CapturePlan

# Of the functions that read the source as its owner. Where policies would hide rows from that they raise: rows that are
# only hidden must not pass for deleted.
DEFINER = "SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET row_security = off"


def content_function_statements(plan: CapturePlan, schema: str) -> dict[str, str]:
    """Return the functions of the users' expressions, by suffix.

    Their parameters are the input columns. The planner inlines them where they are called.
    """
    functions = dict(plan.watched)
    types = {"filter": "boolean", "content": plan.content_type}
    if plan.tenant is not None:
        functions["tenant_value"] = plan.tenant
    return {
        suffix: f"""CREATE FUNCTION {plan.expression(suffix, schema)}(
            {", ".join(f"{quote_ident(name)} {column_type}" for name, column_type in expression.columns)})
        RETURNS {types.get(suffix, "text")} LANGUAGE sql STABLE
        BEGIN ATOMIC SELECT {expression.text}; END"""
        for suffix, expression in functions.items()
        if expression.text
    }


def changed_function_statement(plan: CapturePlan) -> str:
    """Return the function that tells if input columns changed the content.

    An error counts as a change.
    """
    columns = plan.expression_columns
    parameters = [
        f"{side}_{i + 1} {column_type}" for side in ("old", "new") for i, (_, column_type) in enumerate(columns)
    ]
    places = {name: i + 1 for i, (name, _) in enumerate(columns)}
    differences = [
        " IS DISTINCT FROM ".join(
            f"{plan.expression(suffix)}({', '.join(f'{side}_{places[name]}' for name, _ in expression.columns)})"
            for side in ("old", "new")
        )
        for suffix, expression in plan.watched.items()
    ]
    return f"""CREATE OR REPLACE FUNCTION {plan.generated("changed")}({", ".join(parameters)})
        RETURNS boolean LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
        AS """ + quote_literal(f"""
        BEGIN
            RETURN {" OR ".join(differences)};
        EXCEPTION WHEN OTHERS OR assert_failure THEN
            -- The application's write goes through; the worker will meet the same error and keep it as a dead letter.
            RETURN true;
        END
        """)


def read_function_statements(plan: CapturePlan) -> list[str]:
    """Return the functions through which workers read the source.

    They are SECURITY DEFINER, of the source's owner.
    """
    content = plan.call("content", plan.content, "source_row")
    prefix = plan.call("prefix", plan.prefix, "source_row") if plan.prefix else "NULL::text"
    accepted = f"coalesce({plan.call('filter', plan.filter, 'source_row')}, false)" if plan.filter else "true"
    arrays = ", ".join(f"{quote_ident(key.name)} {key.type}[]" for key in plan.keys)
    unnested = plan.key_names
    max_bytes = f"${len(plan.keys) + 1}"
    # Of a file that is too large a byte more than is allowed is enough to tell.
    shown = f"substr(r.content, 1, {MAX_MEDIA_BYTES + 1})" if plan.is_file else "r.content"
    wanted = f"unnest({unnested}) WITH ORDINALITY AS wanted ({unnested}, ordinality)"
    join = " AND ".join(
        f"source_row.{quote_ident(key.source_name)} = wanted.{quote_ident(key.name)}" for key in plan.keys
    )
    order = ", ".join(f"source_row.{quote_ident(key.source_name)}" for key in plan.keys)
    return [
        # Contents up to max_bytes in all; past that the row comes back deferred, and is asked for again.
        f"""CREATE OR REPLACE FUNCTION {plan.generated("read")}({arrays}, max_bytes bigint)
        RETURNS TABLE (
            ordinality bigint, accepted boolean, deferred boolean, content {plan.content_type}, content_hash bytea,
            prefix text)
        LANGUAGE sql STABLE {DEFINER}
        BEGIN ATOMIC
        SELECT r.ordinality, r.accepted, r.before >= {max_bytes},
            CASE WHEN r.before < {max_bytes} THEN {shown} END,
            CASE WHEN r.before < {max_bytes} THEN {content_hash_sql(plan, "r.content", "r.prefix")} END,
            CASE WHEN r.before < {max_bytes} THEN r.prefix END
        FROM (
            SELECT c.ordinality, c.accepted, c.content, c.prefix,
                coalesce(sum(octet_length(c.content)::bigint) OVER (
                    ORDER BY c.ordinality ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before
            FROM (
                SELECT wanted.ordinality, {accepted} AS accepted, CASE WHEN {accepted} THEN {content} END AS content,
                    CASE WHEN {accepted} THEN {prefix} END AS prefix
                FROM {wanted} JOIN {plan.rows} AS source_row ON {join}
            ) AS c
        ) AS r
        ORDER BY r.ordinality;
        END""",
        # KEY SHARE conflicts with a DELETE or a change of the key, not with any other UPDATE. SKIP LOCKED: a worker
        # never waits for an application's lock. No expression of the owner's: what these do is rolled back.
        f"""CREATE OR REPLACE FUNCTION {plan.generated("lock")}({arrays})
        RETURNS TABLE (ordinality bigint)
        LANGUAGE sql VOLATILE {DEFINER}
        BEGIN ATOMIC
        SELECT wanted.ordinality FROM {wanted} JOIN {plan.rows} AS source_row ON {join}
        ORDER BY {order}
        FOR KEY SHARE OF source_row SKIP LOCKED;
        END""",
        f"""CREATE OR REPLACE FUNCTION {plan.generated("look")}({arrays})
        RETURNS TABLE (ordinality bigint, accepted boolean, content_hash bytea)
        LANGUAGE sql STABLE {DEFINER}
        BEGIN ATOMIC
        SELECT wanted.ordinality, {accepted},
            CASE WHEN {accepted} THEN {content_hash_sql(plan, content, prefix)} END
        FROM {wanted} JOIN {plan.rows} AS source_row ON {join};
        END""",
        range_function_statement(plan),
    ]


def content_hash_sql(plan: CapturePlan, content: str, prefix: str) -> str:
    """Return the hash of a row's content and prefix.

    A row with another hash must be embedded again.
    """
    hashed = f"sha256(convert_to({content}, 'UTF8'))" if plan.content_type == "text" else f"sha256({content})"
    if plan.prefix is None:
        return hashed
    # The hash of two hashes: no other pair of texts gives the same bytes. NULL where the content is.
    return f"sha256({hashed} || sha256(convert_to(coalesce({prefix}, ''), 'UTF8')))"


def tenant_function_statements(plan: CapturePlan) -> list[str]:
    """Return the function that gives the tenants of an array of keys.

    It is SECURITY DEFINER, of the source's owner.

    An expression that fails must not hold the queue up: such a row has no tenant.
    """
    if plan.tenant is None:
        return []
    types = ", ".join(column_type for _, column_type in plan.tenant.columns)
    arguments = ", ".join(f"source_row.{quote_ident(name)}" for name, _ in plan.tenant.columns)
    places = ", ".join(f"${i + 1}" for i in range(len(plan.tenant.columns)))
    arrays = ", ".join(f"{quote_ident(key.name)} {key.type}[]" for key in plan.keys)
    join = " AND ".join(
        f"source_row.{quote_ident(key.source_name)} = wanted.{quote_ident(key.name)}" for key in plan.keys
    )
    return [
        f"""CREATE OR REPLACE FUNCTION {plan.generated("tenant_or_null")}({types})
        RETURNS text LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
        AS """
        + quote_literal(f"""
        BEGIN
            RETURN {plan.expression("tenant_value")}({places});
        EXCEPTION WHEN OTHERS OR assert_failure THEN
            RETURN NULL;
        END
        """),
        f"""CREATE OR REPLACE FUNCTION {plan.generated("tenant")}({arrays})
        RETURNS TABLE (ordinality bigint, tenant text)
        LANGUAGE sql STABLE {DEFINER}
        BEGIN ATOMIC
        SELECT wanted.ordinality, {plan.generated("tenant_or_null")}({arguments})
        FROM unnest({plan.key_names}) WITH ORDINALITY AS wanted ({plan.key_names}, ordinality)
        JOIN {plan.rows} AS source_row ON {join};
        END""",
    ]


def range_function_statement(plan: CapturePlan) -> str:
    """Return the function that reads the keys of a block range.

    The range is of the source or of one of its partitions.
    """
    returned_keys = ", ".join(f"{quote_ident(key.name)} {key.type}" for key in plan.keys)
    return f"""CREATE OR REPLACE FUNCTION {plan.generated("range")}(
            relation regclass, from_tid tid, to_tid tid, row_limit integer)
        RETURNS TABLE (row_tid tid, {returned_keys})
        LANGUAGE plpgsql STABLE {DEFINER}
        AS """ + quote_literal(f"""
        BEGIN
            RETURN QUERY EXECUTE format(
                'SELECT source_row.ctid, %s FROM ONLY %s AS source_row'
                ' WHERE source_row.ctid >= $1 AND source_row.ctid < $2 ORDER BY source_row.ctid LIMIT $3',
                {quote_literal(plan.keys_of_row("source_row"))}, relation)
            USING from_tid, to_tid, row_limit;
        END
        """)
