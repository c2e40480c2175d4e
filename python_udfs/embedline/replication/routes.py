"""SQL text of a subscriber's views and functions.

They show the version that serves on the publisher.
"""

from __future__ import annotations

from dataclasses import dataclass

from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.pipelines import published
from embedline.pipelines.ddl.plan import CHUNK_COLUMNS, CapturePlan
from embedline.pipelines.ddl.view import is_shown
from embedline.postgres.relations import data_name
from embedline.postgres.session import Session

# Tries for the lock of the routing view, of 10 ms each and 20 ms apart: 6 s. The changes of the subscription wait meanwhile.
_TRIES = 200


@dataclass(frozen=True)
class Subscriber:
    """What a subscriber has of a pipeline, and how its objects are called."""

    pipeline: Pipeline
    plan: CapturePlan
    source: Source
    has_source: bool
    reader: str | None

    def _beside_source(self, name: str) -> str:
        return f"{quote_ident(self.source.schema)}.{quote_ident(name)}"

    def view(self, number: int | None = None) -> str:
        """Return the name of the routing view, or of the view over one version."""
        return self._beside_source(names.view(self.pipeline.name, number))

    def generated(self, suffix: str) -> str:
        """Return the name of a table or function in embedline_data."""
        return data_name(names.generated(self.pipeline.name, suffix))

    @property
    def routing(self) -> str:
        """Return the table of published versions."""
        return published.routing_table(self.pipeline.name)

    @property
    def versions(self) -> str:
        """Return the view of the versions for readers."""
        return self._beside_source(names.generated(self.pipeline.name, "versions"))

    @property
    def search(self) -> str:
        """Return the function that ranks by a vector."""
        return self._beside_source(names.generated(self.pipeline.name, "search"))

    @property
    def columns(self) -> dict[str, str]:
        """Return the names of the views' columns by those of the chunks and of the key."""
        return self.pipeline.view_columns


def version_view(session: Session, subscriber: Subscriber, version: Pipeline) -> str:
    """Return the statement that creates the view over one version.

    With the source it is the publisher's own view, because all names are the same. Without it, it shows the key alone.
    A row that is deleted then goes when a worker of the publisher has removed its chunks.
    """
    view = subscriber.view(version.version.number)
    if subscriber.has_source:
        query = session.scalar("SELECT pg_get_viewdef($1::oid)", ["bigint"], version.version.view_oid)
        return f"CREATE OR REPLACE VIEW {view} WITH (security_invoker = true) AS{str(query).rstrip().rstrip(';')}"
    chunk_columns = {
        "chunk_id": "c.chunk_id", "chunk_seq": "c.seq", "chunk_start": "c.start_offset", "chunk_end": "c.end_offset",
        "chunk": "c.content", "embedding": f"v.{quote_ident(version.version.column)}",
    }  # fmt: skip
    keys = [f"c.{quote_ident(key.name)} AS {quote_ident(subscriber.columns[key.name])}" for key in subscriber.plan.keys]
    shown = [f"{chunk_columns[c]} AS {quote_ident(subscriber.columns[c])}" for c in CHUNK_COLUMNS]
    return (
        f"CREATE OR REPLACE VIEW {view} WITH (security_invoker = true) AS SELECT {', '.join(keys + shown)}"
        f" FROM {version.vectors} AS v JOIN {version.chunk} AS c ON c.chunk_id = v.chunk_id"
        f" WHERE {is_shown(subscriber.plan, 'c')}"
    )


def route_statements(subscriber: Subscriber, versions: list[Pipeline]) -> list[str]:
    """Return the statements that have the routing view follow the publisher."""
    here, route = subscriber.generated("here"), subscriber.generated("route")
    routed, forget = subscriber.generated("routed"), subscriber.generated("forget")
    rows = ", ".join(
        f"({v.version.number}, ARRAY[{quote_literal(v.chunk)}, {quote_literal(v.vectors)}],"
        f" {quote_literal(subscriber.view(v.version.number))})"
        for v in versions
    )
    return [
        f"CREATE TABLE IF NOT EXISTS {here} (\n    version integer PRIMARY KEY, tables text[] NOT NULL, view text NOT NULL,\n"
        "    is_shown boolean NOT NULL DEFAULT false, was_shown boolean NOT NULL DEFAULT false\n)",
        f"INSERT INTO {here} (version, tables, view) VALUES {rows} ON CONFLICT (version) DO NOTHING",
        f"CREATE OR REPLACE VIEW {subscriber.versions} AS\n"
        "SELECT r.*, coalesce(h.is_shown, false) AS is_shown, coalesce(h.was_shown, false) AS was_shown\n"
        f"FROM {subscriber.routing} AS r LEFT JOIN {here} AS h ON h.version = r.version",
        _route(subscriber),
        f"REVOKE ALL ON FUNCTION {route}(integer) FROM public",
        f"SELECT {route}({subscriber.pipeline.version.number}) WHERE NOT EXISTS (SELECT FROM {here} WHERE is_shown)",
        f"CREATE OR REPLACE FUNCTION {routed}() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp\n"
        f"AS $body$ BEGIN PERFORM {route}(NEW.version); RETURN NULL; END $body$",
        f"REVOKE ALL ON FUNCTION {routed}() FROM public",
        f"CREATE OR REPLACE TRIGGER embedline_route AFTER INSERT OR UPDATE ON {subscriber.routing} FOR EACH ROW\n"
        f"WHEN (NEW.serves) EXECUTE FUNCTION {routed}()",
        # Rows of a subscription fire no other triggers.
        f"ALTER TABLE {subscriber.routing} ENABLE ALWAYS TRIGGER embedline_route",
        _forget(subscriber),
        f"REVOKE ALL ON FUNCTION {forget}(integer) FROM public",
    ]


def _route(subscriber: Subscriber) -> str:
    name, subscription = subscriber.pipeline.name, names.publication(subscriber.pipeline.name)
    view, embedding = subscriber.view(), subscriber.columns["embedding"]
    body = f"""
DECLARE
    routing_view CONSTANT text := {quote_literal(view).strip()};
    pipeline CONSTANT text := {quote_literal(name).strip()};
    again CONSTANT text := {quote_literal(f"SELECT {subscriber.generated('route')}();").strip()};
    shown integer := (SELECT h.version FROM {subscriber.generated("here")} AS h WHERE h.is_shown);
    coming record;
    query text;
    rights text[];
    statement text;
BEGIN
    wanted := coalesce(wanted, (SELECT r.version FROM {subscriber.routing} AS r WHERE r.serves));
    IF wanted IS NULL OR wanted = shown THEN
        RETURN wanted IS NOT NULL;
    END IF;
    SELECT * INTO coming FROM {subscriber.generated("here")} AS h WHERE h.version = wanted;
    IF NOT FOUND THEN
        RAISE WARNING 'version % of pipeline "%" serves on the publisher, and its tables are not here', wanted, pipeline
            USING DETAIL = format('Searches here stay with version %s.', shown),
            HINT = format('Run the text of SELECT embedline.subscriber_ddl(%L) of the publisher here, then'
                ' ALTER SUBSCRIPTION %I REFRESH PUBLICATION; and, when its copy is done, %s',
                pipeline, {quote_literal(subscription).strip()}, again);
        RETURN false;
    END IF;
    -- A table that is still being copied would be shown with gaps.
    IF shown IS NOT NULL AND EXISTS (
        SELECT FROM unnest(coming.tables) AS t (name) WHERE NOT EXISTS (
            SELECT FROM pg_subscription_rel AS s WHERE s.srrelid = to_regclass(t.name) AND s.srsubstate IN ('s', 'r'))
    ) THEN
        RAISE WARNING 'version % of pipeline "%" serves on the publisher, and its copy is not complete here', wanted, pipeline
            USING DETAIL = format('Searches here stay with version %s.', shown),
            HINT = format('ALTER SUBSCRIPTION %I REFRESH PUBLICATION; begins the copy. When pg_subscription_rel has'
                ' srsubstate r for all tables: %s', {quote_literal(subscription).strip()}, again);
        RETURN false;
    END IF;
    -- The vectors are shown without dimensions, so that a version of others can take the place.
    SELECT format('SELECT %s FROM %s AS e', string_agg(CASE a.attname WHEN {quote_literal(embedding).strip()}
        THEN format('e.%1$I::%2$s AS %1$I', a.attname, format_type(a.atttypid, NULL))
        ELSE format('e.%I', a.attname) END, ', ' ORDER BY a.attnum), coming.view) INTO query
    FROM pg_attribute AS a WHERE a.attrelid = coming.view::regclass AND a.attnum > 0 AND NOT a.attisdropped;
    -- A session that waits for the view's lock makes all readers wait that come after. So the lock is asked for briefly.
    FOR attempt IN 1..{_TRIES} LOOP
        BEGIN
            BEGIN
                EXECUTE format('CREATE OR REPLACE VIEW %s WITH (security_invoker = true) AS %s', routing_view, query);
            EXCEPTION WHEN invalid_table_definition THEN
                -- The type of the vectors changes, which no view takes in place.
                SELECT array_agg(format('GRANT %s ON %s TO %s', g.privilege_type, routing_view,
                    CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(g.grantee)) END))
                INTO rights FROM pg_class AS c, aclexplode(c.relacl) AS g
                WHERE c.oid = routing_view::regclass AND g.grantee <> c.relowner;
                EXECUTE format('DROP VIEW %s', routing_view);
                EXECUTE format('CREATE VIEW %s WITH (security_invoker = true) AS %s', routing_view, query);
                FOREACH statement IN ARRAY coalesce(rights, ARRAY[]::text[]) LOOP
                    EXECUTE statement;
                END LOOP;
            END;
            UPDATE {subscriber.generated("here")} AS h
            SET is_shown = h.version = wanted, was_shown = h.was_shown OR h.version = wanted
            WHERE h.version = wanted OR h.is_shown;
            RETURN true;
        EXCEPTION
            WHEN lock_not_available THEN
                PERFORM pg_sleep(0.02);
            WHEN dependent_objects_still_exist THEN
                RAISE WARNING 'other objects depend on %, and the type of its vectors changes', routing_view
                    USING DETAIL = format('Searches here stay with version %s.', shown),
                    HINT = format('Drop them, run %s and create them again.', again);
                RETURN false;
        END;
    END LOOP;
    RAISE WARNING 'sessions hold %, so it does not show version % yet', routing_view, wanted
        USING DETAIL = format('Searches here stay with version %s.', shown),
        HINT = format('When their transactions have ended: %s', again);
    RETURN false;
END
"""
    return (
        f"CREATE OR REPLACE FUNCTION {subscriber.generated('route')}(wanted integer DEFAULT NULL) RETURNS boolean\n"
        f"LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lock_timeout = '10ms'\nAS {_dollar_quoted(body)}"
    )


def _forget(subscriber: Subscriber) -> str:
    here = subscriber.generated("here")
    body = f"""
DECLARE
    doomed record;
    name text;
BEGIN
    DELETE FROM {here} AS h WHERE h.version = gone AND NOT h.is_shown RETURNING * INTO doomed;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'version % is not here, or it is the one that is shown', gone;
    END IF;
    EXECUTE format('DROP VIEW %s', doomed.view);
    FOREACH name IN ARRAY doomed.tables LOOP
        IF NOT EXISTS (SELECT FROM {here} AS h WHERE name = ANY (h.tables)) THEN
            EXECUTE format('DROP TABLE %s', name);
        END IF;
    END LOOP;
END
"""
    return (
        f"CREATE OR REPLACE FUNCTION {subscriber.generated('forget')}(gone integer) RETURNS void\n"
        f"LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp\nAS {_dollar_quoted(body)}"
    )


def search_statement(subscriber: Subscriber) -> str:
    """Return the function that ranks by a vector.

    It ranks the version that is shown, or the one of a model.
    """
    columns = {name: quote_ident(shown) for name, shown in subscriber.columns.items()}
    keys = ", ".join(f"e.{columns[key.name]}::text" for key in subscriber.plan.keys)
    key = keys if len(subscriber.plan.keys) == 1 else f"pg_catalog.jsonb_build_array({keys})::text"
    # Doubled, because format() reads the names.
    names_in_format = {name: shown.replace("%", "%%") for name, shown in columns.items()}
    ranked = (
        f"SELECT n.key, n.chunk, %1$s - n.distance, n.chunk_start, n.chunk_end, %2$s FROM ("
        f"SELECT {key.replace('%', '%%')} AS key, e.{names_in_format['chunk']} AS chunk,"
        f" e.{names_in_format['chunk_start']} AS chunk_start, e.{names_in_format['chunk_end']} AS chunk_end,"
        f" e.{names_in_format['embedding']} OPERATOR(%3$s) %4$L::%5$s AS distance FROM %6$s AS e ORDER BY 5 LIMIT %7$s"
        ") AS n ORDER BY n.distance, n.key"
    )
    prefix = f"{quote_ident(subscriber.source.schema)}."
    view_prefix = names.view(subscriber.pipeline.name, 0).removesuffix("0")
    body = f"""
#variable_conflict use_column
DECLARE
    chosen record;
    space text;
BEGIN
    IF $1 IS NULL OR $2 IS NULL OR $2 < 1 THEN
        RAISE EXCEPTION 'a search needs a vector and a k of at least 1' USING ERRCODE = '22023',
            HINT = 'Leave k out for ten rows.';
    END IF;
    -- The text comes from a model, and only that model's vectors can be compared with it.
    SELECT r.* INTO chosen FROM {subscriber.versions} AS r
    WHERE CASE WHEN $3 IS NULL THEN r.is_shown ELSE r.was_shown AND r.model_fingerprint = $3 END
    ORDER BY r.is_shown DESC, r.version DESC LIMIT 1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no version here was embedded by a model of fingerprint %', $3 USING ERRCODE = '42704',
            DETAIL = coalesce((SELECT string_agg(format('Version %s: %s', r.version, r.model_fingerprint), '; '
                ORDER BY r.version) FROM {subscriber.versions} AS r WHERE r.was_shown), 'Nothing is copied yet.'),
            HINT = {quote_literal(f"SELECT * FROM {subscriber.versions}; tells the model and its fingerprint.").strip()};
    END IF;
    IF cardinality(string_to_array($1, ',')) <> chosen.dimensions THEN
        RAISE EXCEPTION 'the query has % dimensions, and version % has %',
            cardinality(string_to_array($1, ',')), chosen.version, chosen.dimensions USING ERRCODE = '22000',
            HINT = format('Embed the query with model %s of fingerprint %s.', chosen.model, chosen.model_fingerprint);
    END IF;
    space := (SELECT quote_ident(n.nspname) FROM pg_extension AS x JOIN pg_namespace AS n ON n.oid = x.extnamespace
        WHERE x.extname = 'vector');
    RETURN QUERY EXECUTE format({quote_literal(ranked).strip()},
        CASE chosen.distance WHEN 'cosine' THEN 1 ELSE 0 END, chosen.version,
        space || '.' || CASE chosen.distance WHEN 'cosine' THEN '<=>' WHEN 'inner_product' THEN '<#>' ELSE '<->' END,
        $1, space || '.' || chosen.column_type,
        {quote_literal(prefix).strip()} || quote_ident({quote_literal(view_prefix).strip()} || chosen.version), $2);
END
"""
    return (
        f"CREATE OR REPLACE FUNCTION {subscriber.search}(query text, k integer DEFAULT 10, fingerprint text DEFAULT NULL)\n"
        "RETURNS TABLE (key text, chunk text, score double precision, chunk_start integer, chunk_end integer,"
        " version integer)\n"
        "LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET hnsw.iterative_scan = 'strict_order'\n"
        f"SET hnsw.ef_search = '100' SET ivfflat.iterative_scan = 'relaxed_order'\nAS {_dollar_quoted(body)};\n"
        f"REVOKE ALL ON FUNCTION {subscriber.search}(text, integer, text) FROM public"
    )


def _dollar_quoted(body: str) -> str:
    """Return a function's body as a constant.

    A name in the body may have the delimiter in it.
    """
    tag = "body"
    while f"${tag}$" in body:
        tag += "_"
    return f"${tag}${body}${tag}$"
