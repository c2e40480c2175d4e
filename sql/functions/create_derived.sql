-- Keep a vector for each subject of a table of events: the weighted mean of its items' vectors. Items are rows of a
-- pipeline's source. Workers compute it; no model is called.
-- Locks: SHARE ROW EXCLUSIVE on the events while their triggers are created; waits at most 5 s for it.
CREATE OR REPLACE FUNCTION embedline.create_derived(
    name text,
    pipeline text,
    events regclass,
    subject text,
    item_key text,
    weight text DEFAULT NULL,
    at text DEFAULT NULL,
    half_life interval DEFAULT NULL,
    -- Evaluated as the caller, so names in the expressions resolve as in the session.
    expression_search_path text DEFAULT current_setting('search_path')
)
RETURNS text
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- Generated code must not depend on the session.
SET quote_all_identifiers = off
SET standard_conforming_strings = on
AS $python$
    from embedline.pipelines import derived
    return derived.create_derived(plpy, GD, {
        "name": name, "pipeline": pipeline, "events": events, "subject": subject, "item_key": item_key,
        "weight": weight, "at": at, "half_life": half_life, "expression_search_path": expression_search_path,
    })
$python$;

COMMENT ON FUNCTION embedline.create_derived(text, text, regclass, text, text, text, text, interval, text) IS 'Keep a vector for each subject of a table of events: the weighted mean of its items'' vectors. Returns the view, <name>_derived in the table''s schema.';
