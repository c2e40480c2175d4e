-- All rights in one place. No role has any by default. Functions are executable by PUBLIC unless that right is
-- revoked.
REVOKE ALL ON SCHEMA embedline, embedline_data, embedline_expression, embedline_search FROM public;
REVOKE ALL ON ALL TABLES IN SCHEMA embedline FROM public;
REVOKE ALL ON ALL ROUTINES IN SCHEMA embedline FROM public;
REVOKE ALL ON FUNCTION public.embed_pending(integer, text) FROM public;

-- An administrator may do everything that a worker and a reader may.
GRANT embedline_worker TO embedline_admin;
GRANT embedline_reader TO embedline_admin;

GRANT USAGE ON SCHEMA embedline TO embedline_worker, embedline_reader;
GRANT USAGE ON SCHEMA embedline_search TO embedline_reader;

-- Readers: search, status, and the catalogue that search needs. None of it holds a secret.
-- Of allowed_endpoint and media_source nothing but SELECT is granted, because only a superuser decides where texts and
-- keys are sent, and which files are read.
GRANT SELECT ON
embedline.model, embedline.allowed_endpoint, embedline.media_source,
embedline.pipeline, embedline.setting, embedline.status
TO embedline_reader, embedline_worker;
-- All of these but the words of the last error, which may repeat a text; see _shown_error.
REVOKE ALL ON TABLE embedline.version, embedline.derived FROM embedline_reader, embedline_worker;
GRANT SELECT ON embedline.version, embedline.derived TO embedline_admin;
DO $do$
DECLARE
    columns text;
    relation regclass;
BEGIN
    FOR relation, columns IN
        SELECT a.attrelid::regclass, string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute AS a
        WHERE a.attrelid IN ('embedline.version'::regclass, 'embedline.derived'::regclass) AND a.attnum > 0
            AND NOT a.attisdropped AND a.attname <> 'last_error'
        GROUP BY a.attrelid
    LOOP
        EXECUTE format('GRANT SELECT (%s) ON %s TO embedline_reader, embedline_worker', columns, relation);
    END LOOP;
END
$do$;
GRANT SELECT ON embedline.budget, embedline.usage, embedline.rate_limit TO embedline_reader, embedline_worker;
GRANT SELECT ON embedline.dead_letter, embedline.backfill_range, embedline.worker, embedline.circuit TO embedline_admin;
GRANT SELECT ON embedline.provider_batch, embedline.bulk_rule TO embedline_admin;
GRANT EXECUTE ON FUNCTION
embedline.search(
    text, text, integer, boolean, integer, text, text, text, double precision, double precision, integer, integer, text,
    text, boolean, text
)
TO embedline_reader;
GRANT SELECT ON embedline.keyword_build TO embedline_reader, embedline_worker;
GRANT EXECUTE ON FUNCTION
embedline.search(text, bytea, integer, boolean, integer, text, text, text, text, boolean, text),
embedline.embed_query(text, text),
embedline.embed_query(text, bytea),
embedline.search_across(text [], text, integer, boolean),
embedline.search_across(text [], bytea, integer, boolean)
TO embedline_reader;
GRANT EXECUTE ON FUNCTION
embedline.rerank(text, text, text []),
embedline._reserve_rerank(text, bigint, bigint),
embedline._settle_rerank(bigint, bigint)
TO embedline_reader;

-- The state of a row. The inner function is run by generated functions alone: readers cannot name its schema.
REVOKE ALL ON FUNCTION embedline_data._row_state(text, integer, text []) FROM public;
GRANT EXECUTE ON FUNCTION embedline.state(text, text, integer) TO embedline_reader;
GRANT EXECUTE ON FUNCTION embedline_data._row_state(text, integer, text []) TO embedline_reader;
GRANT SELECT ON embedline.precision_index, embedline.index_reach TO embedline_reader, embedline_worker;

-- Postings of all rows, kept where only a ranking reads them. Generated functions alone can name it.
REVOKE ALL ON FUNCTION
embedline_data._hold_postings(bigint [], bigint [], integer [], bigint [], bytea [], bytea [], bytea [])
FROM public;
GRANT EXECUTE ON FUNCTION
embedline_data._hold_postings(bigint [], bigint [], integer [], bigint [], bytea [], bytea [], bytea [])
TO embedline_reader;

-- Derived vectors: their searches run with the caller's rights on the events and on the source.
GRANT SELECT ON embedline.derived_status TO embedline_reader, embedline_worker;
GRANT EXECUTE ON FUNCTION embedline._derived_counts(text) TO embedline_reader, embedline_worker;
GRANT EXECUTE ON FUNCTION embedline.search_derived(text, text, integer, boolean, boolean) TO embedline_reader;
GRANT EXECUTE ON FUNCTION
embedline.create_derived(text, text, regclass, text, text, text, text, interval, text),
embedline.drop_derived(text)
TO embedline_admin;
GRANT EXECUTE ON FUNCTION
embedline._pipeline_counts(text), embedline._workers_alive(), embedline.index_progress(text),
embedline._index_state(text), embedline._source_trouble(bigint), embedline._shown_error(text),
embedline.evaluation_progress(text)
TO embedline_reader, embedline_worker;

-- Readers see what the work does; the views show no text and no key.
GRANT SELECT ON embedline.batch, embedline.throughput, embedline.progress, embedline.alert
TO embedline_reader, embedline_worker;
GRANT EXECUTE ON FUNCTION embedline._progress(), embedline._alert_conditions(), embedline.metrics()
TO embedline_reader, embedline_worker;

-- Quality over time: numbers are for readers. Canaries and noted queries are texts, and only administrators read them.
GRANT SELECT ON embedline.quality, embedline.quality_baseline TO embedline_reader, embedline_worker;
GRANT SELECT ON embedline.canary, embedline.query_sample, embedline.drift_probe, embedline.quality_check
TO embedline_admin;
GRANT EXECUTE ON FUNCTION embedline._note_query(bigint, text) TO embedline_reader;
GRANT EXECUTE ON FUNCTION embedline._quality_step(text, boolean) TO embedline_worker;
GRANT EXECUTE ON FUNCTION
embedline.set_canaries(text, regclass),
embedline._store_canaries(text, jsonb),
embedline.check_quality(text, boolean),
embedline.accept_quality(text),
embedline.sample_queries(text, double precision, interval)
TO embedline_admin;

-- Vectors from outside: the owner of a source lends them to its pipeline.
GRANT EXECUTE ON FUNCTION
embedline.add_loan(text, integer, uuid [], bytea []),
embedline.end_loan(text, integer),
embedline.check_vectors(text, integer, text [], bytea []),
embedline.sample_chunks(text, integer)
TO embedline_admin;

-- Workers: embed, and nothing else.
GRANT EXECUTE ON FUNCTION embedline.embed_pending(integer, text), public.embed_pending(integer, text)
TO embedline_worker;
GRANT EXECUTE ON FUNCTION embedline._worker_step(text, integer, text, text) TO embedline_worker;
GRANT EXECUTE ON PROCEDURE embedline.run_worker(double precision, text, integer, boolean) TO embedline_worker;

-- Remote workers: these functions, and nothing else. Which pipelines is decided by the owners of their sources.
GRANT USAGE ON SCHEMA embedline TO embedline_remote;
GRANT EXECUTE ON FUNCTION
embedline.remote_model(text, integer),
embedline.claim_batch(text, integer, integer, integer, integer),
embedline.finish_batch(bigint, integer, bytea, bigint),
embedline.fail_batch(bigint, integer, text, text, double precision),
embedline.release_batches()
TO embedline_remote;
GRANT SELECT ON embedline.remote_grant TO embedline_admin;
GRANT EXECUTE ON FUNCTION embedline.grant_remote(text, name, boolean), embedline.revoke_remote(text, name)
TO embedline_admin;

-- Administrators: pipelines on tables that they own, and the schedule. Models are for superusers.
GRANT EXECUTE ON FUNCTION
embedline.configure(text, double precision),
embedline.configure(text, text),
embedline.create_pipeline(
    text, regclass, text, text, text, text, integer, integer, text, text, text, jsonb, text,
    text, text, double precision, jsonb, text, text, text, text, text
),
embedline.alter_pipeline(
    text, text, text, text, text, text, integer, integer, jsonb, double precision, text,
    text [], text, text, text
),
embedline.drop_pipeline(text),
embedline.pause_pipeline(text),
embedline.resume_pipeline(text),
embedline.resume_model(text),
embedline.refresh_pipeline(text),
embedline.move_pipeline(text, regclass),
embedline.alter_source(regclass, text),
embedline._take_away(regclass),
embedline._put_back(bigint),
embedline.index_statement(text, integer, text),
embedline.build_vector_index(text, integer),
embedline._index_plan(text, integer, text, integer),
embedline.add_precision_index(text, integer, text, integer, real),
embedline.drop_precision_index(text, integer, text),
embedline.use_precision(text, integer, text),
embedline._job_troubles(),
embedline.doctor(),
embedline.schedule_workers(integer),
embedline.unschedule_workers()
TO embedline_admin;

-- Replication: the owner of a source publishes its pipeline.
GRANT EXECUTE ON FUNCTION
embedline.publication(text, boolean, text, boolean, text),
embedline.drop_publication(text),
embedline.subscriber_ddl(text, boolean, text)
TO embedline_admin;

-- Money: an administrator sets budgets and prices; readers see them.
GRANT EXECUTE ON FUNCTION
embedline.set_budget(text, text, text, bigint, numeric),
embedline.drop_budget(text, text, text),
embedline.set_price(text, numeric),
embedline.set_rate_limit(text, integer, bigint),
embedline.estimate(text, text, text, integer, text),
embedline.compare_costs(
    text, text, text, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, numeric, text,
    integer, text
),
embedline._measured_rates(),
embedline._note_rate(text, double precision),
embedline._work_done(text),
embedline._resolve_attributes()
TO embedline_admin;

-- Sweeps and dead letters. A repair queues rows and removes data that no row needs. It never decides anything new.
GRANT SELECT ON embedline.verification TO embedline_admin;
GRANT EXECUTE ON FUNCTION
embedline.verify(text, boolean, integer),
embedline.requeue(text, jsonb, text, boolean),
embedline.purge_dead_letters(interval),
embedline.schedule_nightly(time, boolean),
embedline._nightly_step(text, text, boolean, text)
TO embedline_admin;
GRANT EXECUTE ON PROCEDURE embedline.run_nightly(boolean) TO embedline_admin;

-- Versions: the owner of a source upgrades its model; readers see the progress.
GRANT SELECT ON
embedline.chunk_set, embedline.versions, embedline.precision_index, embedline.traffic, embedline.traffic_tenant
TO embedline_reader, embedline_worker;
GRANT SELECT ON
embedline.version_queue, embedline.version_dead_letter, embedline.evaluation, embedline.cutover, embedline.shadow_read
TO embedline_admin;
GRANT EXECUTE ON FUNCTION embedline._version_counts(text, integer, integer, bigint), embedline._gate(bigint)
TO embedline_reader, embedline_worker;
GRANT EXECUTE ON FUNCTION
embedline._note_shadow_read(bigint, integer, double precision, double precision, double precision)
TO embedline_reader;
GRANT EXECUTE ON FUNCTION
embedline.add_embedding_version(
    text, text, text, text, text, jsonb, text, integer, integer, jsonb, text, integer
),
embedline.configure_backfill(text, integer, text, integer),
embedline.configure_bulk(text, integer, time, time),
embedline.accept_dead_letters(text, integer),
embedline.requeue_version(text, integer),
embedline.cutover(text, integer, text),
embedline.rollback(text),
embedline.set_traffic(text, integer, double precision, double precision),
embedline.set_tenant_version(text, text, integer),
embedline.drop_embedding_version(text, integer, interval)
TO embedline_admin;

-- Gates: an administrator measures and stores the results, but cannot set the role and the time of the record.
GRANT INSERT (
    pipeline_id, version_id, baseline_number, baseline_version_id, baseline_fingerprint, kind, verdict,
    fidelity_verdict, quality_verdict, query_source, query_count, k, margin, seed, fingerprint, evidence
) ON embedline.evaluation TO embedline_admin;
GRANT EXECUTE ON FUNCTION
embedline.evaluate(
    text, integer, regclass, integer, double precision, integer, name, bigint, double precision, text
),
embedline.use_mode(text, text, integer, text),
embedline.preview_version(text, text, regclass, integer, integer, double precision, integer, bigint),
embedline._embed_chunks(text, text, bigint []),
embedline.compare_chunkings(text, jsonb, regclass, integer, integer, bigint, boolean),
embedline._embed_chunkings(text, jsonb, bigint [], text [], boolean)
TO embedline_admin;

-- Training: pairs are texts, which only administrators read. Superusers register models, and their training with them.
GRANT SELECT ON embedline.training, embedline.training_pair TO embedline_admin;
GRANT EXECUTE ON FUNCTION embedline.query_hash(text) TO embedline_reader;
GRANT EXECUTE ON FUNCTION embedline.collect_pairs(text, regclass, integer, text) TO embedline_admin;
