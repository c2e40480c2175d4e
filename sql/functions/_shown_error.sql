-- Return an error's words for a member of embedline_admin, and a remark in their place for others. The
-- source may hide a row whose key stands before the words, or whose text a provider repeats in its refusal.
CREATE OR REPLACE FUNCTION embedline._shown_error(message text)
RETURNS text
LANGUAGE sql
STABLE
SET search_path = pg_catalog, pg_temp
AS $sql$
    SELECT CASE
        WHEN message IS NULL THEN NULL
        -- The caller, also inside functions that run as their owner.
        WHEN pg_has_role(
            CASE current_setting('role') WHEN 'none' THEN session_user::text ELSE current_setting('role') END,
            'embedline_admin', 'USAGE'
        ) THEN message
        ELSE 'an error, whose words members of embedline_admin see'
    END
$sql$;

COMMENT ON FUNCTION embedline._shown_error(text) IS 'Internal: return an error''s words for those who may see any row.';
