"""Generate the tables and functions of a pipeline's keyword index.

    embedline_data.<pipeline>_keyword_entry     words of chunks that are in no segment yet, one row a chunk
    embedline_data.<pipeline>_keyword_segment   up to 65,536 chunks each
    embedline_data.<pipeline>_keyword_page      the words of a segment, with their chunks
    embedline_search.<pipeline>_v<n>_keyword_terms(content)              the words of a text
    embedline_search.<pipeline>_v<n>_keyword_read(words)                 what a ranking needs, put into the session's memory
    embedline_search.<pipeline>_v<n>_keyword_shown(segments, ...)        the chunks of a ranking, as the source shows them
    embedline_search.<pipeline>_v<n>_keyword_segments()                  the segments that there are

Tables belong to a chunk set (docs_keyword_entry, docs_keyword_2_entry), functions to a version. The functions run with their
caller's rights, as those of search_functions do. keyword_terms names the text search configuration in its parsed body, so
that a configuration in use cannot be dropped.
"""

from __future__ import annotations

from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.pipelines.ddl.plan import CapturePlan
from embedline.pipelines.ddl.view import SHOWN_TEXT, is_shown, shown_key

FUNCTIONS = ("keyword_terms", "keyword_read", "keyword_shown", "keyword_segments")
TABLES = ("entry", "segment", "page")
# Characters of a chunk whose words are indexed. A tsvector holds 1 MB of words, and its making takes 2 µs a word.
_CHARACTERS = 100_000
# A word that a chunk has more often counts this many times; a tsvector keeps 256 places of a word.
_MOST = 255


def table_statements(plan: CapturePlan, number: int) -> list[str]:
    """Return the tables of the keyword index of one chunk set."""
    entry, segment, page = (plan.generated(names.keyword_suffix(number, part)) for part in TABLES)
    constraint = {
        part: quote_ident(names.generated(plan.name, f"{names.keyword_suffix(number, part)}_pkey")) for part in TABLES
    }
    return [
        # No foreign key, which would cost each chunk a check: chunks that are gone drop out when entries are packed.
        f"""CREATE TABLE {entry} (
            chunk_id bigint NOT NULL CONSTRAINT {constraint["entry"]} PRIMARY KEY,
            length integer NOT NULL,
            words bytea NOT NULL,
            counts bytea NOT NULL,
            head bytea NOT NULL
                GENERATED ALWAYS AS (int8send(chunk_id) || int4send(length) || int4send(length(counts))) STORED
        ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
            autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 20000)""",
        f"ALTER TABLE {entry} ALTER COLUMN words SET STORAGE EXTERNAL, ALTER COLUMN counts SET STORAGE EXTERNAL",
        f"COMMENT ON TABLE {entry} IS 'Words of chunks that are in no segment of the keyword index yet'",
        f"COMMENT ON COLUMN {entry}.length IS 'Words of the chunk without stop words'",
        f"COMMENT ON COLUMN {entry}.words IS 'Hash of each different word, 8 bytes each'",
        f"COMMENT ON COLUMN {entry}.counts IS 'How often the chunk has the word, one byte each'",
        f"COMMENT ON COLUMN {entry}.head IS 'Id, length and number of different words, in 16 bytes, for reading many at once'",
        f"""CREATE TABLE {segment} (
            segment_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT {constraint["segment"]} PRIMARY KEY,
            chunk_count integer NOT NULL,
            total_length bigint NOT NULL,
            mean_length real NOT NULL,
            chunk_ids bytea NOT NULL,
            lengths bytea NOT NULL
        )""",
        # Single ids are read out of it, and PostgreSQL reads a part only of what is not compressed.
        f"ALTER TABLE {segment} ALTER COLUMN chunk_ids SET STORAGE EXTERNAL",
        f"COMMENT ON TABLE {segment} IS 'Chunks of the keyword index, up to 65,536 in a row'",
        f"COMMENT ON COLUMN {segment}.mean_length IS 'Mean length of all chunks when the weights were computed'",
        f"COMMENT ON COLUMN {segment}.chunk_ids IS 'Ids of the chunks in order, 8 bytes each'",
        f"COMMENT ON COLUMN {segment}.lengths IS 'Words of each chunk, 4 bytes each'",
        f"""CREATE TABLE {page} (
            segment_id bigint NOT NULL,
            first_word bigint NOT NULL,
            last_word bigint NOT NULL,
            postings bytea NOT NULL,
            CONSTRAINT {constraint["page"]} PRIMARY KEY (segment_id, first_word)
        )""",
        f"ALTER TABLE {page} ALTER COLUMN postings SET STORAGE EXTERNAL",
        f"COMMENT ON TABLE {page} IS 'The words of a segment by hash, each with its chunks and its weight in them'",
        *(f"REVOKE ALL ON TABLE {table} FROM public" for table in (entry, segment, page)),
    ]


def function_statements(plan: CapturePlan, pipeline: Pipeline) -> list[str]:
    """Return the functions of a version's keyword ranking, created or replaced."""
    entry, segment, page = (pipeline.keyword_table(part) for part in TABLES)
    join = " AND ".join(f"c.{quote_ident(key.name)} = s.{quote_ident(key.source_name)}" for key in plan.keys)
    shown = shown_key(plan)
    config = f"{quote_literal(pipeline.keyword or '')}::pg_catalog.regconfig"
    terms, read, of_ranking, segments = (pipeline.search_function(suffix) for suffix in FUNCTIONS)
    return [
        f"""CREATE OR REPLACE FUNCTION {terms}(content text)
        RETURNS TABLE (length integer, words bytea, counts bytea) LANGUAGE sql STABLE PARALLEL SAFE
        BEGIN ATOMIC
            SELECT coalesce(sum(t.count), 0)::integer,
                coalesce(string_agg(int8send(t.word), ''::bytea), ''::bytea),
                coalesce(string_agg(substring(int2send(t.count) FROM 2), ''::bytea), ''::bytea)
            FROM (SELECT hashtextextended(u.lexeme, 0) AS word, least(cardinality(u.positions), {_MOST})::smallint AS count
                FROM unnest(to_tsvector({config}, left(content, {_CHARACTERS}))) AS u) AS t;
        END""",
        # One statement, so one snapshot: a chunk that moves from the entries to a segment is seen once. The caller is given
        # a number in place of the postings.
        f"""CREATE OR REPLACE FUNCTION {read}(words bigint[])
        RETURNS bigint LANGUAGE sql VOLATILE
        BEGIN ATOMIC
            SELECT embedline_data._hold_postings(array_agg(r.segment_id), array_agg(r.word), array_agg(r.chunk_count),
                array_agg(r.total_length), array_agg(r.heads), array_agg(r.postings), array_agg(r.counts))
            FROM (
            SELECT s.segment_id, NULL::bigint AS word, s.chunk_count, s.total_length,
                NULL::bytea AS heads, NULL::bytea AS postings, NULL::bytea AS counts
            FROM {segment} AS s
            UNION ALL
            SELECT s.segment_id, w.word, NULL, NULL, NULL, p.postings, NULL
            FROM {segment} AS s CROSS JOIN unnest(words) AS w (word)
            CROSS JOIN LATERAL (
                SELECT g.last_word, g.postings FROM {page} AS g
                WHERE g.segment_id = s.segment_id AND g.first_word <= w.word ORDER BY g.first_word DESC LIMIT 1
            ) AS p WHERE p.last_word >= w.word
            UNION ALL
            SELECT NULL, NULL, count(*)::integer, sum(e.length)::bigint, string_agg(e.head, ''::bytea),
                string_agg(e.words, ''::bytea), string_agg(e.counts, ''::bytea)
            FROM {entry} AS e
            ) AS r;
        END""",
        f"""CREATE OR REPLACE FUNCTION {of_ranking}(
            segments bigint[], ordinals integer[], segment_scores double precision[],
            chunks bigint[], chunk_scores double precision[])
        RETURNS TABLE (chunk_id bigint, key text, chunk text, chunk_start integer, chunk_end integer, score double precision)
        LANGUAGE sql STABLE PARALLEL SAFE
        BEGIN ATOMIC
            SELECT c.chunk_id, {shown}, {SHOWN_TEXT}, c.start_offset, c.end_offset, r.score
            FROM (
                SELECT ('x' || encode(substring(g.chunk_ids FROM h.ordinal * 8 + 1 FOR 8), 'hex'))::bit(64)::bigint AS chunk_id,
                    h.score
                FROM unnest(segments, ordinals, segment_scores) AS h (segment_id, ordinal, score)
                JOIN {segment} AS g ON g.segment_id = h.segment_id
                UNION ALL
                SELECT h.chunk_id, h.score FROM unnest(chunks, chunk_scores) AS h (chunk_id, score)
            ) AS r
            JOIN {pipeline.chunk} AS c ON c.chunk_id = r.chunk_id
            JOIN {plan.rows} AS s ON {join} WHERE {is_shown(plan, "c")};
        END""",
        f"""CREATE OR REPLACE FUNCTION {segments}()
        RETURNS SETOF bigint LANGUAGE sql STABLE PARALLEL SAFE
        BEGIN ATOMIC
            SELECT s.segment_id FROM {segment} AS s;
        END""",
    ]
