"""Check settings, roles, publications, packages and the model host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata

from embedline.model_host.running import running_hosts
from embedline.observe.findings import Finding
from embedline.postgres.cron import has_cron
from embedline.postgres.session import Session

# Settings that end a worker: its CALL is one statement that lasts as long as the worker.
_FATAL_TIMEOUTS = ("statement_timeout", "transaction_timeout", "idle_in_transaction_session_timeout")
# Roles that run workers: those of pg_cron's jobs, and members of embedline_worker that can log in. The value of a setting
# for a role in this database goes before that for the role, for the database, and for all.
_WORKER_SETTINGS = """
    WITH worker AS (
        SELECT r.oid, r.rolname FROM pg_roles AS r
        WHERE r.rolcanlogin AND NOT r.rolsuper AND pg_has_role(r.oid, 'embedline_worker', 'usage')
        UNION
        SELECT r.oid, r.rolname FROM pg_roles AS r WHERE r.rolname = ANY ($1)
    )
    SELECT w.rolname, c.name, c.value, c.scope
    FROM worker AS w CROSS JOIN LATERAL (
        SELECT DISTINCT ON (s.name) s.name, s.value, s.scope FROM (
            SELECT split_part(o.option, '=', 1) AS name, split_part(o.option, '=', 2) AS value,
                CASE WHEN d.setrole <> 0 THEN 'ROLE' ELSE 'DATABASE' END AS scope,
                CASE WHEN d.setrole <> 0 AND d.setdatabase <> 0 THEN 1 WHEN d.setrole <> 0 THEN 2 ELSE 3 END AS place
            FROM pg_db_role_setting AS d CROSS JOIN LATERAL unnest(d.setconfig) AS o (option)
            WHERE d.setrole IN (0, w.oid)
                AND d.setdatabase IN (0, (SELECT b.oid FROM pg_database AS b WHERE b.datname = current_database()))
            UNION ALL
            SELECT g.name, g.reset_val, 'SYSTEM', 4 FROM pg_settings AS g WHERE g.source IN ('configuration file', 'default')
        ) AS s
        WHERE s.name = ANY ($2)
        ORDER BY s.name, s.place
    ) AS c
    WHERE c.value NOT IN ('0', '0ms', '0s', '-1', '')
    ORDER BY w.rolname, c.name
"""
_JOB_ROLES = """
    SELECT DISTINCT username FROM cron.job WHERE database = current_database() AND jobname LIKE 'embedline %'
"""
_RESIDENT_JOBS = "SELECT count(*) FROM cron.job WHERE active AND command LIKE '%embedline.run_worker%'"
_PUBLISHED = """
    SELECT p.pubname, count(*) AS tables, coalesce((
        SELECT string_agg(DISTINCT quote_ident(o.schemaname), ', ') FROM pg_publication_tables AS o
        WHERE o.pubname = p.pubname AND o.schemaname NOT IN ('embedline', 'embedline_data')
    ), 'public') AS schemas,
    -- Embedline's own publications hold what a subscriber searches, and no queue.
    bool_or(p.schemaname = 'embedline' OR p.tablename ~ '_(inbox|claim|outbox)$') AS has_queues, string_agg(
        format('ALTER TABLE %I.%I REPLICA IDENTITY FULL;', p.schemaname, p.tablename), ' '
    ) FILTER (
        WHERE c.relreplident = 'n' OR (c.relreplident = 'd' AND NOT EXISTS (
            SELECT FROM pg_index AS i WHERE i.indrelid = c.oid AND i.indisprimary))
    ) AS remedy
    FROM pg_publication_tables AS p
    JOIN pg_namespace AS n ON n.nspname = p.schemaname
    JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = p.tablename
    WHERE p.schemaname IN ('embedline', 'embedline_data')
    GROUP BY p.pubname ORDER BY p.pubname
"""
# Versions of sentence-transformers that give wrong vectors with flash attention.
_FAULTY_SENTENCE_TRANSFORMERS = ((5, 5, 0), (5, 6, 0))


def settings(session: Session) -> Iterator[Finding]:
    """Check settings of the server that the work depends on."""
    if session.scalar("SELECT current_setting('autovacuum')") != "on":
        why = "autovacuum is off: the queues are emptied all the time, and each claim gets slower"
        remedy = "ALTER SYSTEM SET autovacuum = on; SELECT pg_reload_conf();"
        yield Finding("critical", "autovacuum_off", "server", why, remedy)
    if has_cron(session):
        most = int(session.scalar("SELECT current_setting('cron.max_running_jobs')"))
        jobs = int(session.scalar(_RESIDENT_JOBS))
        if jobs >= most:
            why = f"pg_cron runs {most} jobs at a time, and {jobs} are resident workers: no other job runs"
            remedy = f"ALTER SYSTEM SET cron.max_running_jobs = {jobs + 5}; -- and restart the server"
            yield Finding("warning", "too_few_jobs", "server", why, remedy)


def worker_roles(session: Session) -> Iterator[Finding]:
    """Check that no setting of a role ends its workers."""
    names = [row["username"] for row in session.query(_JOB_ROLES)] if has_cron(session) else []
    for row in session.query(_WORKER_SETTINGS, ["text[]", "text[]"], names, list(_FATAL_TIMEOUTS)):
        role, name = str(row["rolname"]), str(row["name"])
        what = f"{name} is {row['value']} for role {role}: it ends a worker, whose CALL is one statement"
        yield Finding("warning", "worker_timeout", role, what, f'ALTER ROLE "{role}" SET {name} = 0;')


def publications(session: Session) -> Iterator[Finding]:
    """Check publications that hold Embedline's own tables."""
    for row in session.query(_PUBLISHED):
        name = str(row["pubname"])
        if row["remedy"]:
            what = "it publishes tables without a replica identity, so PostgreSQL refuses to change them"
            yield Finding("critical", "publication_stops", name, what, str(row["remedy"]))
        elif row["has_queues"]:
            what = f"it publishes {row['tables']} of Embedline's tables: each claim goes to every subscriber"
            remedy = f'DROP PUBLICATION "{name}"; CREATE PUBLICATION "{name}" FOR TABLES IN SCHEMA {row["schemas"]};'
            yield Finding("note", "publication_of_queues", name, what, remedy)


def embedding_packages(session: Session) -> Iterator[Finding]:
    """Check packages in the server's Python for versions with known wrong vectors."""
    installed = _version("sentence-transformers")
    if installed is None or _version("flash-attn") is None:
        return
    number = tuple(int(part) for part in installed.split(".")[:3] if part.isdecimal())
    if _FAULTY_SENTENCE_TRANSFORMERS[0] <= number <= _FAULTY_SENTENCE_TRANSFORMERS[1]:
        what = f"sentence-transformers {installed} with flash-attn gives wrong vectors"
        yield Finding("critical", "wrong_vectors", "server", what, "pip install 'sentence-transformers>5.6.0'")


def model_host(session: Session) -> Iterator[Finding]:
    """Show the model hosts that run, if a local model needs one."""
    hosts = running_hosts(os.getppid())
    for host in hosts:
        what = f"process {host.pid} has {host.resident_bytes // 1024**2:,} MB"
        yield Finding("ok", "model_host", host.name, what)
    local = session.scalar("SELECT count(*) FROM embedline.model WHERE provider = 'sentence-transformers'")
    if local and not hosts:
        yield Finding("ok", "model_host", "server", "none runs; the first text for a local model starts one")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
