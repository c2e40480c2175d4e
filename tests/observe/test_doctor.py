"""embedline.doctor(): each finding comes with the whole command, and goes once that was run."""

from __future__ import annotations

import psycopg
from psycopg import sql

from conftest import Connect, MakeRole
from generated_names import PAGE
from support import create_pages, create_pipeline, scalar, settle

_FINDING = "SELECT severity, subject, remedy FROM embedline.doctor() WHERE finding = %s"


def _found(connection: psycopg.Connection, name: str) -> list[tuple[str, str, str]]:
    return connection.execute(_FINDING, (name,)).fetchall()


def test_a_new_database_has_no_critical_finding_and_no_warning(database: psycopg.Connection) -> None:
    create_pages(database, 20)
    create_pipeline(database)
    settle(database)
    found = database.execute("SELECT * FROM embedline.doctor() WHERE severity IN ('critical', 'warning')").fetchall()
    assert found == []


def test_a_timeout_of_a_worker_role_is_found_at_each_level(database: psycopg.Connection, make_role: MakeRole) -> None:
    role = make_role("embedline_worker")
    assert _found(database, "worker_timeout") == []
    database.execute(sql.SQL("ALTER ROLE {} SET statement_timeout = '30s'").format(sql.Identifier(role)))
    (found,) = _found(database, "worker_timeout")
    assert found == ("warning", role, f'ALTER ROLE "{role}" SET statement_timeout = 0;')
    database.execute(found[2].encode())
    assert _found(database, "worker_timeout") == []


def test_vectors_of_norm_zero_and_of_another_length_are_found_and_repaired(database: psycopg.Connection) -> None:
    create_pages(database, 20)
    create_pipeline(database)
    settle(database)
    table = PAGE.version(1)
    database.execute(
        f"UPDATE {table} SET embedding_v1 = array_fill(0, ARRAY[256])::vector"
        f" WHERE chunk_id = (SELECT min(chunk_id) FROM {table})"
    )
    database.execute(
        f"UPDATE {table} SET embedding_v1 = embedding_v1 * array_fill(2, ARRAY[256])::vector"
        f" WHERE chunk_id = (SELECT max(chunk_id) FROM {table})"
    )
    (found,) = _found(database, "wrong_norms")
    database.execute(found[2].encode())
    assert _found(database, "wrong_norms") == []


def test_a_publication_of_all_tables_is_told_because_it_sends_the_queues(database: psycopg.Connection) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    database.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    ((severity, subject, _),) = _found(database, "publication_of_queues")
    assert (severity, subject) == ("note", "everything")
    database.execute(f"ALTER TABLE {PAGE('inbox')} REPLICA IDENTITY NOTHING")
    ((severity, _, remedy),) = _found(database, "publication_stops")
    assert severity == "critical"
    database.execute(remedy.encode())
    assert _found(database, "publication_stops") == []


def test_a_check_that_fails_is_reported_and_the_others_go_on(database: psycopg.Connection) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    settle(database)
    database.execute(f"ALTER TABLE {PAGE.version(1)} RENAME TO page_away")
    subjects = [subject for _, subject, _ in _found(database, "not_checked")]
    assert subjects == ["stored_vectors"]
    assert scalar(database, "SELECT count(*) FROM embedline.doctor() WHERE finding = 'old_pgvector'") in (0, 1)


def test_readers_have_no_doctor_and_administrators_do(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    admin = connect(make_role("embedline_admin"))
    assert scalar(admin, "SELECT count(*) >= 0 FROM embedline.doctor()")
    reader = connect(make_role("embedline_reader"))
    assert scalar(reader, "SELECT count(*) >= 0 FROM embedline.alert")
    assert scalar(reader, "SELECT count(*) >= 0 FROM embedline.progress")
    assert scalar(reader, "SELECT count(*) >= 0 FROM embedline.batch")
    assert scalar(reader, "SELECT has_function_privilege('embedline.doctor()', 'EXECUTE')") is False
