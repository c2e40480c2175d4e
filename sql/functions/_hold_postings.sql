-- Keep what a keyword ranking reads in the session's memory; return its number. No reader can name its schema. The
-- generated functions <pipeline>_v<n>_keyword_read call it: postings tell which chunks have a word, hidden ones too.
CREATE OR REPLACE FUNCTION embedline_data._hold_postings(
    segment_ids bigint [],
    words bigint [],
    chunk_counts integer [],
    total_lengths bigint [],
    heads bytea [],
    postings bytea [],
    counts bytea []
)
RETURNS bigint
LANGUAGE plpython3u
VOLATILE
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.search import held_postings
    return held_postings.hold_postings(
        plpy, GD, (segment_ids, words, chunk_counts, total_lengths, heads, postings, counts))
$python$;

COMMENT ON FUNCTION embedline_data._hold_postings(bigint [], bigint [], integer [], bigint [], bytea [], bytea [], bytea []) IS 'Internal: keep postings where no SQL can read them, for keyword rankings.';
