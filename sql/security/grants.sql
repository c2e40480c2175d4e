-- All rights in one place. Nobody has any by default: functions are executable by PUBLIC unless that is taken away.
REVOKE ALL ON SCHEMA embedline, embedline_data FROM public;
REVOKE ALL ON ALL TABLES IN SCHEMA embedline FROM public;
REVOKE ALL ON ALL ROUTINES IN SCHEMA embedline FROM public;
REVOKE ALL ON FUNCTION public.embed_pending(integer, text) FROM public;

-- An administrator does all that a worker and a reader do.
GRANT embedline_worker TO embedline_admin;
GRANT embedline_reader TO embedline_admin;

GRANT USAGE ON SCHEMA embedline TO embedline_worker, embedline_reader;

-- Readers: search, status, and the catalogue that search needs. None of it holds a secret.
GRANT SELECT ON
embedline.model, embedline.pipeline, embedline.version, embedline.setting, embedline.status
TO embedline_reader, embedline_worker;
GRANT SELECT ON embedline.dead_letter, embedline.backfill_range, embedline.worker, embedline.circuit TO embedline_admin;
GRANT EXECUTE ON FUNCTION embedline.search(text, text, integer, boolean, integer) TO embedline_reader;
GRANT EXECUTE ON FUNCTION embedline.embed_query(text, text) TO embedline_reader;
GRANT EXECUTE ON FUNCTION embedline._pipeline_counts(text), embedline._workers_alive()
TO embedline_reader, embedline_worker;

-- Workers: embed, and nothing else.
GRANT EXECUTE ON FUNCTION embedline.embed_pending(integer, text), public.embed_pending(integer, text)
TO embedline_worker;
GRANT EXECUTE ON FUNCTION embedline._worker_step(text, integer, text, text) TO embedline_worker;
GRANT EXECUTE ON PROCEDURE embedline.run_worker(double precision, text, integer, boolean) TO embedline_worker;

-- Administrators: pipelines on tables that they own, and the schedule. Models are for superusers.
GRANT EXECUTE ON FUNCTION
embedline.create_pipeline(
    text, regclass, text, text, text, text, integer, integer, text, text, text, jsonb, text, text
),
embedline.drop_pipeline(text),
embedline.pause_pipeline(text),
embedline.resume_pipeline(text),
embedline.refresh_pipeline(text),
embedline.index_statement(text),
embedline.schedule_workers(integer),
embedline.unschedule_workers()
TO embedline_admin;
