-- Set one setting whose value is a text, such as an interval, or reset it with NULL; returns its value. The two forms
-- of configure differ in the type of the value; a quoted value or NULL takes this one.
CREATE OR REPLACE FUNCTION embedline.configure(setting text, value text)
RETURNS text
LANGUAGE plpython3u
VOLATILE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
    from embedline.catalog import settings
    return settings.configure_text(plpy, GD, setting, value)
$python$;

COMMENT ON FUNCTION embedline.configure(text, text) IS 'Set one setting to a text, such as dead_letter_retention to an interval; NULL sets the default.';
