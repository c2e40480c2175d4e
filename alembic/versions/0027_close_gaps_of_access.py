"""Keep the list of addresses at which models may be asked, and hide the statistics of generated tables from readers.

What: table allowed_endpoint, which begins with this machine's own addresses, the services of OpenAI, Cohere and Jina, and the
addresses of the models that are registered. Row-level security, with a policy that hides no row, on the generated tables that
readers may SELECT: pg_stats showed them texts of rows that the source hides. The functions <pipeline>_v<n>_keyword_read,
which showed the words of such rows, are written again. Lock: ACCESS EXCLUSIVE on the generated tables,
which searches wait for; none on any table of the user. How long: under a second, once a search that runs has ended; the
revision waits 10 s for each table and can be run again. Undo: `alembic downgrade 0026`; the list is lost, any address may be
asked again, and pg_stats shows what it did.

Revision ID: 0027
Revises: 0026
"""

from __future__ import annotations

from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None

# They give their caller postings, here and after a downgrade something else. The pipelines' functions are written again after
# both, because the code has another number.
_DROP_READERS = r"""
    DO $do$
    DECLARE
        reader text;
    BEGIN
        FOR reader IN
            SELECT p.oid::regprocedure::text FROM pg_catalog.pg_proc AS p
            WHERE p.pronamespace = 'embedline_search'::regnamespace AND p.proname ~ '_v[0-9]+_keyword_read$'
        LOOP
            EXECUTE 'DROP FUNCTION ' || reader;
        END LOOP;
    END
    $do$
"""
UPGRADE = (
    """
    CREATE TABLE embedline.allowed_endpoint (
        scheme text NOT NULL,
        host text NOT NULL,
        port integer NOT NULL DEFAULT 0,
        added_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        CONSTRAINT allowed_endpoint_pkey PRIMARY KEY (scheme, host, port),
        CONSTRAINT allowed_endpoint_scheme_check CHECK (scheme IN ('http', 'https')),
        -- As a client reads it from an address: in lower case, an IPv6 address without brackets.
        CONSTRAINT allowed_endpoint_host_check CHECK (
            host = lower(host) AND host ~ '^([*][.])?[^][*/?#@\\s]+$'
        ),
        CONSTRAINT allowed_endpoint_port_check CHECK (port BETWEEN 0 AND 65535)
    )
    """,
    "COMMENT ON TABLE embedline.allowed_endpoint IS"
    " 'Addresses at which models may be asked; only a superuser edits them'",
    "COMMENT ON COLUMN embedline.allowed_endpoint.host IS"
    " 'Name or IP address; *.example.com stands for all names below example.com'",
    "COMMENT ON COLUMN embedline.allowed_endpoint.port IS '0: any port'",
    """
    INSERT INTO embedline.allowed_endpoint (scheme, host, port)
    SELECT s.scheme, h.host, 0 FROM unnest(ARRAY['http', 'https']) AS s (scheme),
        unnest(ARRAY['localhost', '127.0.0.1', '::1']) AS h (host)
    UNION ALL
    SELECT 'https', h.host, 443 FROM unnest(ARRAY['api.openai.com', 'api.cohere.com', 'api.jina.ai']) AS h (host)
    """,
    # A model that a superuser has registered was approved then.
    """
    INSERT INTO embedline.allowed_endpoint (scheme, host, port)
    SELECT DISTINCT f.found[1], lower(btrim(f.found[2], '[]')),
        coalesce(f.found[3]::integer, CASE f.found[1] WHEN 'http' THEN 80 ELSE 443 END)
    FROM embedline.model AS m
    CROSS JOIN regexp_match(m.base_url, '^(https?)://([[][^]/]+[]]|[^]:/?#@\\s]+)(?::([0-9]{1,5}))?(?:[/?#]|$)') AS f (found)
    WHERE f.found IS NOT NULL AND coalesce(f.found[3]::integer, 443) <= 65535
    ON CONFLICT DO NOTHING
    """,
    "REVOKE ALL ON TABLE embedline.allowed_endpoint FROM public",
    # pg_stats leaves out a table whose row-level security is active for the role that reads it.
    """
    DO $do$
    DECLARE
        readable regclass;
    BEGIN
        PERFORM set_config('lock_timeout', '10s', true);
        FOR readable IN
            SELECT c.oid FROM pg_catalog.pg_class AS c
            WHERE c.relnamespace = 'embedline_data'::regnamespace AND c.relkind = 'r' AND NOT c.relrowsecurity
                AND has_table_privilege('embedline_reader', c.oid, 'SELECT')
            ORDER BY c.oid
        LOOP
            EXECUTE format('CREATE POLICY through_views ON %s FOR SELECT USING (true)', readable);
            EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', readable);
        END LOOP;
    END
    $do$
    """,
    _DROP_READERS,
)

DOWNGRADE = (
    "DROP TABLE embedline.allowed_endpoint",
    _DROP_READERS,
    "DROP FUNCTION IF EXISTS embedline_data._hold_postings("
    "bigint [], bigint [], integer [], bigint [], bytea [], bytea [], bytea [])",
    """
    DO $do$
    DECLARE
        readable regclass;
    BEGIN
        FOR readable IN
            SELECT p.polrelid FROM pg_catalog.pg_policy AS p JOIN pg_catalog.pg_class AS c ON c.oid = p.polrelid
            WHERE p.polname = 'through_views' AND c.relnamespace = 'embedline_data'::regnamespace ORDER BY c.oid
        LOOP
            EXECUTE format('DROP POLICY through_views ON %s', readable);
            EXECUTE format('ALTER TABLE %s DISABLE ROW LEVEL SECURITY', readable);
        END LOOP;
    END
    $do$
    """,
)


def _run(statements: tuple[str, ...]) -> None:
    for statement in statements:
        if op.get_context().as_sql:
            op.get_context().impl.static_output(statement + ";")
        else:
            # Plain execution would take ":name" and "%" in the statement for parameters.
            op.get_bind().exec_driver_sql(statement, execution_options={"no_parameters": True})


def upgrade() -> None:
    _run(UPGRADE)


def downgrade() -> None:
    _run(DOWNGRADE)
