"""Who may do what: nobody anything by default; readers what the source lets them; nobody more through us."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from alembic import command
from psycopg import errors, sql

from generated_names import MINE, PAGE
from support import alembic_config, assert_exact, create_pages, create_pipeline, drain, scalar, searching, settle

Connect = Callable[..., psycopg.Connection]
MakeRole = Callable[..., str]


def _grant(database: psycopg.Connection, grant: str, role: str) -> None:
    database.execute(sql.SQL("GRANT {} TO {}").format(sql.SQL(grant), sql.Identifier(role)))


@pytest.fixture
def pages(database: psycopg.Connection) -> psycopg.Connection:
    create_pages(database, 20)
    create_pipeline(database)
    settle(database)
    return database


def test_public_has_no_right_on_anything_of_ours(pages: psycopg.Connection) -> None:
    schemas = "('embedline'::regnamespace, 'embedline_data'::regnamespace, 'embedline_search'::regnamespace)"
    grants = pages.execute(
        f"""
        SELECT 'schema ' || nspname FROM pg_namespace AS n, aclexplode(coalesce(nspacl, acldefault('n', nspowner))) AS a
        WHERE n.oid IN {schemas} AND a.grantee = 0
        UNION ALL
        SELECT 'relation ' || c.oid::regclass FROM pg_class AS c,
            aclexplode(coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner))) AS a
        WHERE c.relnamespace IN {schemas} AND a.grantee = 0
        UNION ALL
        SELECT 'function ' || p.oid::regprocedure FROM pg_proc AS p, aclexplode(coalesce(proacl, acldefault('f', proowner))) AS a
        WHERE (p.pronamespace IN {schemas} OR p.oid = 'public.embed_pending(integer, text)'::regprocedure) AND a.grantee = 0
        UNION ALL
        SELECT 'view page_embedding' FROM pg_class AS c, aclexplode(relacl) AS a
        WHERE c.oid = 'page_embedding'::regclass AND a.grantee = 0
        """
    ).fetchall()
    assert grants == []


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM embedline.status",
        "SELECT * FROM embedline.model",
        "SELECT * FROM embedline.dead_letter",
        f"SELECT * FROM {PAGE('chunk')}",
        f"SELECT * FROM {PAGE('outbox')}",
        f"INSERT INTO {PAGE('outbox')} (key_id) VALUES (1)",
        "SELECT embedline_expression.page_content(page) FROM page",
        f"SELECT * FROM {PAGE('read')}('{{1}}', 1000)",
        "SELECT * FROM embedline_search.page_v1_nearest(NULL, 1)",
        "SELECT * FROM page_embedding",
        "SELECT * FROM embedline.search('page', 'rivers')",
        "SELECT embedline.embed_query('page', 'rivers')",
        "SELECT embed_pending(1)",
        "SELECT embedline.embed_pending(1)",
        "SELECT embedline.create_pipeline('x', 'page', 'body', 'static-256')",
        "SELECT embedline.drop_pipeline('page')",
        "SELECT embedline.pause_pipeline('page')",
        "SELECT embedline.refresh_pipeline('page')",
        "SELECT embedline.create_model('x', 'openai', 'x', base_url => 'http://127.0.0.1:1/v1')",
        "SELECT embedline.drop_model('static-256')",
        "SELECT embedline.schedule_workers(1)",
        "SELECT embedline._worker_step('begin', NULL, NULL, NULL)",
        "CALL embedline.run_worker(max_seconds => 0)",
    ],
)
def test_a_role_without_a_grant_can_do_nothing(
    pages: psycopg.Connection, connect: Connect, make_role: MakeRole, statement: str
) -> None:
    role = make_role()
    _grant(pages, "SELECT ON page", role)
    with pytest.raises(errors.InsufficientPrivilege):
        connect(role).execute(statement)


def test_a_reader_with_the_source_may_search_and_use_the_view(
    pages: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    role = make_role("embedline_reader")
    _grant(pages, "SELECT ON page", role)
    reader = connect(role)
    assert len(searching(reader, "page", "rivers", k=5)) == 5
    assert scalar(reader, "SELECT count(*) FROM page_embedding") == 20
    ranked = "SELECT id FROM page_embedding ORDER BY embedding <=> embedline.embed_query('page', 'rivers') LIMIT 1"
    assert scalar(reader, ranked)
    assert scalar(reader, "SELECT pending FROM embedline.status") == 0


def test_a_reader_without_the_source_sees_nothing(
    pages: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    reader = connect(make_role("embedline_reader"))
    for statement in (
        "SELECT * FROM embedline.search('page', 'rivers')",
        "SELECT chunk FROM page_embedding",
        f"SELECT content FROM {PAGE('chunk')}",
        "SELECT embedline_expression.page_content(NULL)",
        f"SELECT * FROM {PAGE('read')}('{{1}}', 1000)",
        "SELECT * FROM embedline_search.page_v1_nearest(NULL, 1)",
        "SELECT * FROM embedline_search.page_v1_search(NULL, 1, 0, 10)",
        "SELECT * FROM embedline_search.page_v1_beside(NULL, 1, 0, 10)",
        "SELECT * FROM embedline_search.page_v1_ranked(NULL, 1)",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            reader.execute(statement)


def test_a_reader_changes_nothing(pages: psycopg.Connection, connect: Connect, make_role: MakeRole) -> None:
    role = make_role("embedline_reader")
    _grant(pages, "ALL ON page", role)
    reader = connect(role)
    for statement in (
        "SELECT embed_pending(1)",
        "SELECT embedline.drop_pipeline('page')",
        "UPDATE embedline.pipeline SET state = 'paused'",
        f"DELETE FROM {PAGE('chunk')}",
        "CALL embedline.run_worker(max_seconds => 0)",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            reader.execute(statement)


def test_row_level_security_of_the_source_decides_in_view_and_search(
    pages: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    role = make_role("embedline_reader")
    _grant(pages, "SELECT ON page", role)
    pages.execute("ALTER TABLE page ENABLE ROW LEVEL SECURITY")
    pages.execute("CREATE POLICY odd ON page FOR SELECT USING (id % 2 = 1)")
    reader = connect(role)
    assert {row[0] for row in reader.execute("SELECT id % 2 FROM page_embedding")} == {1}
    found = searching(reader, "page", "about mountains", k=20)
    assert len(found) == 10
    assert all(int(key) % 2 == 1 for key, _, _ in found)
    assert len(searching(pages, "page", "about mountains", k=20)) == 20


def test_a_column_that_the_reader_may_not_see_stays_hidden(
    pages: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    role = make_role("embedline_reader")
    _grant(pages, "SELECT (id, title) ON page", role)
    with pytest.raises(errors.InsufficientPrivilege):
        connect(role).execute("SELECT body FROM page_embedding")


def test_row_level_security_that_is_forced_on_the_owner_does_not_lose_rows(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    """Workers read as the source's owner: a policy that hides rows from the owner hides them from the worker too."""
    create_pages(database, 10)
    database.execute("ALTER TABLE page ENABLE ROW LEVEL SECURITY")
    database.execute("CREATE POLICY odd ON page USING (id % 2 = 1)")
    create_pipeline(database)
    settle(database)
    assert assert_exact(database) == 10


def test_a_worker_embeds_without_any_right_on_the_source(
    pages: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    worker = connect(make_role("embedline_worker"))
    pages.execute("UPDATE page SET body = 'changed' WHERE id <= 3")
    assert scalar(worker, "SELECT embed_pending(1000)") == 3
    pages.execute("UPDATE page SET body = 'changed again' WHERE id <= 3")
    worker.execute("CALL embedline.run_worker(max_seconds => 20, until_idle => true)")
    assert_exact(pages)
    for statement in (
        "SELECT * FROM page",
        "SELECT * FROM page_embedding",
        f"SELECT content FROM {PAGE('chunk')}",
        "SELECT embedline.drop_pipeline('page')",
        "SELECT * FROM embedline.search('page', 'x')",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            worker.execute(statement)


@pytest.fixture
def owner(database: psycopg.Connection, make_role: MakeRole) -> str:
    """An administrator who owns table mine in a schema of its own."""
    role = make_role("embedline_admin")
    create_pages(database, 5)
    database.execute("CREATE SCHEMA own")
    _grant(database, "ALL ON SCHEMA own", role)
    create_pages(database, 5, table="own.mine")
    database.execute(sql.SQL("ALTER TABLE own.mine OWNER TO {}").format(sql.Identifier(role)))
    return role


def test_an_administrator_runs_pipelines_on_own_tables(
    database: psycopg.Connection, connect: Connect, owner: str
) -> None:
    admin = connect(owner)
    create_pipeline(admin, name="mine", source="own.mine")
    assert drain(admin) == 5
    assert len(searching(admin, "mine", "rivers", k=2)) == 2
    admin.execute("SELECT embedline.pause_pipeline('mine')")
    admin.execute("SELECT embedline.resume_pipeline('mine')")
    admin.execute("SELECT embedline.refresh_pipeline('mine')")
    assert_exact(database, "mine")
    admin.execute("SELECT embedline.drop_pipeline('mine')")


def test_an_administrator_cannot_touch_what_others_own(
    database: psycopg.Connection, connect: Connect, owner: str
) -> None:
    create_pipeline(database)
    admin = connect(owner)
    with pytest.raises(errors.InsufficientPrivilege, match="owner"):
        create_pipeline(admin, name="theirs", source="page")
    for function in ("drop_pipeline", "pause_pipeline", "resume_pipeline", "refresh_pipeline"):
        with pytest.raises(errors.InsufficientPrivilege, match="owner"):
            admin.execute(f"SELECT embedline.{function}('page')")
    with pytest.raises(errors.InsufficientPrivilege):
        admin.execute("SELECT embedline.create_model('x', 'openai', 'x', base_url => 'http://127.0.0.1:1/v1')")
    with pytest.raises(errors.InsufficientPrivilege):
        admin.execute("SELECT embedline.drop_model('static-256')")


def test_the_view_needs_the_right_to_create_in_the_sources_schema(
    database: psycopg.Connection, connect: Connect, owner: str
) -> None:
    database.execute(sql.SQL("REVOKE CREATE ON SCHEMA own FROM {}").format(sql.Identifier(owner)))
    with pytest.raises(errors.InsufficientPrivilege, match='schema "own"') as caught:
        create_pipeline(connect(owner), name="mine", source="own.mine")
    assert "GRANT CREATE" in (caught.value.diag.message_hint or "")


_WHO = "CREATE FUNCTION own.who(text) RETURNS text LANGUAGE plpgsql STABLE AS $$ BEGIN RETURN current_user || ' ' || $1; END $$"


def test_the_content_expression_runs_as_the_sources_owner(
    database: psycopg.Connection, connect: Connect, owner: str
) -> None:
    admin = connect(owner)
    admin.execute(_WHO)
    create_pipeline(admin, name="mine", source="own.mine", content="own.who(body)", filter="own.who(title) IS NOT NULL")
    settle(database)  # drained by a superuser
    chunks = {row[0].split()[0] for row in database.execute(f"SELECT content FROM {MINE('chunk')}")}
    assert chunks == {owner}


@pytest.mark.parametrize("change", ["ALTER TABLE", "ALTER TABLE, refreshed", "REASSIGN OWNED, refreshed"])
def test_a_new_owner_of_the_source_has_the_pipeline(
    database: psycopg.Connection, connect: Connect, owner: str, make_role: MakeRole, change: str
) -> None:
    heir = make_role("embedline_admin")
    _grant(database, "ALL ON SCHEMA own", heir)
    create_pipeline(connect(owner), name="mine", source="own.mine", filter="views = 0", tenant="title")
    settle(database)
    if "refreshed" in change:
        database.execute("ALTER EVENT TRIGGER embedline_follow_source DISABLE")
    if "REASSIGN" in change:
        database.execute(sql.SQL("REASSIGN OWNED BY {} TO {}").format(sql.Identifier(owner), sql.Identifier(heir)))
        database.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(owner)))
    else:
        database.execute(sql.SQL("ALTER TABLE own.mine OWNER TO {}").format(sql.Identifier(heir)))
    if "refreshed" in change:
        connect(heir).execute("SELECT embedline.refresh_pipeline('mine')")
    database.execute("INSERT INTO own.mine (id, title, body) VALUES (6, 'six', 'new')")
    database.execute("UPDATE own.mine SET body = 'changed' WHERE id = 1")
    settle(database)
    assert scalar(database, "SELECT count(*) FROM embedline.dead_letter") == 0
    assert scalar(database, "SELECT count(*) FROM embedline.verify('mine')") == 0
    assert_exact(database, "mine")
    left = (
        "SELECT count(*) FROM pg_shdepend WHERE refobjid = %s::regrole AND classid IN ('pg_proc'::regclass, 'pg_class'::regclass)"
        " AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    assert scalar(database, left, (f'"{owner}"',)) == 0
    owners = (
        "SELECT array_agg(DISTINCT relowner::regrole::text) FROM pg_class WHERE relname ~ '^mine_embedding'"
        " UNION ALL SELECT array_agg(DISTINCT proowner::regrole::text) FROM pg_proc WHERE proname = 'mine_content'"
    )
    assert [[heir], [heir]] == [[name.strip('"') for name in row[0]] for row in database.execute(owners)]


def test_rows_that_forced_row_security_hides_are_neither_given_up_nor_deleted(
    database: psycopg.Connection, connect: Connect, owner: str
) -> None:
    admin = connect(owner)
    create_pipeline(admin, name="mine", source="own.mine")
    create_pipeline(database)
    settle(database)
    admin.execute("CREATE POLICY mine ON own.mine USING (title = current_setting('app.tenant', true))")
    admin.execute("ALTER TABLE own.mine ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    with pytest.raises(errors.InvalidParameterValue, match="hides rows from its owner") as refused:
        create_pipeline(admin, name="again", source="own.mine")
    assert "NO FORCE ROW LEVEL SECURITY" in (refused.value.diag.message_hint or "")
    database.execute("UPDATE own.mine SET body = 'changed'; UPDATE page SET body = 'changed' WHERE id = 1")
    database.execute("SELECT embedline.refresh_pipeline('mine')")
    warnings: list[str] = []
    database.add_notice_handler(lambda notice: warnings.append(f"{notice.message_primary} {notice.message_hint}"))
    assert drain(database) == 1, "the other pipeline goes on"
    assert "hides rows from its owner" in warnings[0]
    assert "NO FORCE ROW LEVEL SECURITY" in warnings[0]
    database.execute("CALL embedline.run_worker(max_seconds => 30, until_idle => true)")
    assert "NO FORCE" in scalar(database, "SELECT last_error FROM embedline.status WHERE pipeline = 'mine'")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="hides rows from its owner"):
        database.execute("SELECT * FROM embedline.verify('mine', repair => true)")
    for function in (
        "gone()",
        "audit(1, now())",
        "missing(10, 0, NULL, NULL)",
        "present('{1}')",
        "read('{1}', 100)",
        "lock('{1}')",
        "look('{1}')",
    ):
        with pytest.raises(errors.InsufficientPrivilege, match="row-level security"):
            database.execute(f"SELECT * FROM {MINE(function)}")
    assert scalar(database, "SELECT count(*) FROM embedline.dead_letter") == 0
    assert scalar(database, f"SELECT count(*) FROM {MINE('document')} WHERE state = 'embedded'") == 5
    admin.execute("ALTER TABLE own.mine NO FORCE ROW LEVEL SECURITY")
    settle(database)
    assert_exact(database, "mine")


def test_an_expression_cannot_act_with_our_rights(database: psycopg.Connection, connect: Connect, owner: str) -> None:
    """A function that an administrator writes into the content tries to make its author a superuser, at every step."""
    admin = connect(owner)
    admin.execute(
        """
        CREATE FUNCTION own.grab(text) RETURNS text LANGUAGE plpgsql AS $$
        BEGIN
            BEGIN
                EXECUTE format('ALTER ROLE %I SUPERUSER', session_user);
                EXECUTE format('ALTER ROLE %I SUPERUSER', current_user);
            EXCEPTION WHEN OTHERS THEN NULL;
            END;
            RETURN current_user || ' ' || $1;
        END $$
        """
    )
    create_pipeline(admin, name="mine", source="own.mine", content="own.grab(body)", filter="own.grab(title) <> ''")
    settle(database)
    database.execute("UPDATE own.mine SET body = 'by a superuser' WHERE id = 1")
    settle(database)
    admin.execute("SELECT embedline.refresh_pipeline('mine')")
    assert not scalar(database, "SELECT rolsuper FROM pg_roles WHERE rolname = %s", (owner,))


@pytest.fixture
def robber(database: psycopg.Connection, connect: Connect, owner: str) -> psycopg.Connection:
    """An administrator with a function that drops another's pipeline, in whosever session it runs."""
    create_pipeline(database)
    admin = connect(owner)
    admin.execute(
        """
        CREATE FUNCTION own.rob(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
        BEGIN
            PERFORM embedline.drop_pipeline('page');
            RETURN $1;
        EXCEPTION WHEN insufficient_privilege THEN
            RETURN $1 || ' ' || SQLERRM;
        END $$
        """
    )
    return admin


def test_an_expression_cannot_act_in_the_name_of_the_worker(
    database: psycopg.Connection, robber: psycopg.Connection
) -> None:
    create_pipeline(
        robber, name="mine", source="own.mine", content="own.rob(body)", filter="own.rob(title) IS NOT NULL"
    )
    settle(database)
    assert scalar(database, "SELECT count(*) FROM embedline.pipeline") == 2
    assert scalar(database, f"SELECT bool_and(content LIKE '%may not change%') FROM {MINE('chunk')}")
    database.execute("SELECT * FROM embedline.verify('mine', repair => true)")
    database.execute("SELECT * FROM embedline.estimate('mine')")
    assert scalar(database, "SELECT count(*) FROM embedline.pipeline") == 2


def test_what_an_expression_sets_off_is_undone(database: psycopg.Connection, connect: Connect, owner: str) -> None:
    """A deferred trigger would run at the worker's commit with its rights, a search_path be that of its next statement."""
    admin = connect(owner)
    admin.execute(
        """
        CREATE TABLE own.bait (id integer);
        CREATE FUNCTION own.spring() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            EXECUTE format('ALTER ROLE %I CREATEDB', (SELECT relowner::regrole::text FROM pg_class WHERE oid = TG_RELID));
            RETURN NULL;
        EXCEPTION WHEN insufficient_privilege THEN RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER spring AFTER INSERT ON own.bait DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION own.spring();
        CREATE FUNCTION own.lay(x text) RETURNS text LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO own.bait VALUES (1);
            PERFORM set_config('search_path', 'own, pg_catalog', false);
            RETURN x;
        END $$;
        CREATE FUNCTION own.quiet(x text) RETURNS text LANGUAGE plpgsql STABLE AS $$ BEGIN RETURN own.lay(x); END $$;
        """
    )
    create_pipeline(
        admin, name="mine", source="own.mine", content="own.quiet(body)", tenant="own.quiet(title)",
        filter="own.quiet(title) IS NOT NULL",
    )  # fmt: skip
    settle(database)
    database.execute(f"DELETE FROM {MINE('document')} WHERE key_id = 1")
    database.execute("SELECT * FROM embedline.verify('mine', repair => true)")
    admin.execute("UPDATE own.mine SET body = 'changed' WHERE id = 2")
    settle(database)
    database.execute("SELECT * FROM embedline.estimate('mine')")
    assert not scalar(database, "SELECT rolcreatedb FROM pg_roles WHERE rolname = %s", (owner,))
    stored = f"SELECT array_agg(content ORDER BY key_id) FROM {MINE('chunk')}"
    assert scalar(database, stored) == scalar(admin, "SELECT array_agg(body ORDER BY id) FROM own.mine")
    assert scalar(database, "SHOW search_path") == '"$user", public'


def test_a_function_of_an_index_cannot_act_in_the_name_of_who_analyses(
    database: psycopg.Connection, robber: psycopg.Connection
) -> None:
    robber.execute("CREATE INDEX ON own.mine (own.rob(body))")
    database.execute("ANALYZE own.mine")
    database.execute("REINDEX TABLE own.mine")
    assert scalar(database, "SELECT count(*) FROM embedline.pipeline") == 1
    assert scalar(database, "SELECT embedline.drop_pipeline('page') IS NOT NULL")


_GRAB = """
    CREATE FUNCTION own.grab(x text) RETURNS boolean LANGUAGE plpgsql AS $$
    BEGIN
        EXECUTE format('ALTER ROLE %I CREATEDB', session_user);
        RETURN true;
    EXCEPTION WHEN insufficient_privilege THEN RETURN true;
    END $$
"""


def _assert_nothing_grabbed(database: psycopg.Connection, owner: str) -> None:
    assert not scalar(database, "SELECT rolcreatedb FROM pg_roles WHERE rolname = %s", (owner,))


@pytest.mark.parametrize(
    ("setup", "content"),
    [
        # Folded when the expression is planned.
        (
            "CREATE FUNCTION own.fixed(x text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS"
            " $$ BEGIN RETURN own.grab(x)::text; END $$",
            "body || own.fixed('now')",
        ),
        # Checked when the constant is parsed.
        (
            "CREATE DOMAIN own.checked AS text CHECK (own.grab(VALUE)); CREATE TYPE own.pair AS (x own.checked)",
            "body || ('(x)'::own.pair)::text",
        ),
    ],
    ids=["folded", "parsed"],
)
def test_an_expression_is_parsed_and_planned_with_its_owners_rights(
    database: psycopg.Connection, connect: Connect, owner: str, setup: str, content: str
) -> None:
    admin = connect(owner)
    admin.execute(_GRAB)
    admin.execute(setup.encode())
    create_pipeline(admin, name="mine", source="own.mine", content=content)
    _assert_nothing_grabbed(database, owner)
    admin.execute("SELECT embedline.alter_pipeline('mine', filter => %s)", (f"({content}) IS NOT NULL",))
    assert drain(admin) == 5
    _assert_nothing_grabbed(database, owner)
    assert scalar(database, "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'embedline_new%'") == 0


def test_a_source_owner_can_name_no_generated_object(
    database: psycopg.Connection, connect: Connect, owner: str
) -> None:
    """Not to have functions run as their caller, and not to read the texts of other owners' sources."""
    create_pipeline(database)
    admin = connect(owner)
    create_pipeline(admin, name="mine", source="own.mine")
    settle(database)
    for statement in (
        f"ALTER FUNCTION {MINE('read')}(integer[], bigint) SECURITY INVOKER",
        f"DROP FUNCTION {MINE('changed')}(text, text, text, text)",
        f"SELECT content FROM {PAGE('chunk')}",
        f"SELECT chunk_id FROM {PAGE.version(1)}",
        f"SELECT content FROM {MINE('chunk')}",
        "CREATE FUNCTION embedline_expression.more() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        "SELECT embedline_expression.page_content('a', 'b')",
        "ALTER FUNCTION embedline_search.mine_v1_nearest(vector, bigint) SECURITY DEFINER",
        "CREATE FUNCTION embedline_search.more() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        "SELECT * FROM embedline_search.page_v1_nearest(NULL, 1)",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            admin.execute(statement)
    admin.execute("UPDATE own.mine SET body = 'changed' WHERE id = 1")
    assert drain(admin) == 1
    assert_exact(database, "mine")
    assert admin.execute("SELECT * FROM embedline.verify('mine')").fetchall() == []


def test_a_column_name_cannot_end_the_body_of_a_function(
    database: psycopg.Connection, connect: Connect, owner: str
) -> None:
    """Without check_function_bodies nothing notices that a body ends too early, and the rest would be statements of ours."""
    admin = connect(owner)
    admin.execute('ALTER TABLE own.mine RENAME COLUMN body TO "$plpgsql$;CREATE TABLE own.found();SELECT $plpgsql$"')
    admin.execute("SET check_function_bodies = off")
    create_pipeline(
        admin, name="mine", source="own.mine", content='"$plpgsql$;CREATE TABLE own.found();SELECT $plpgsql$"'
    )
    assert scalar(database, "SELECT to_regclass('own.found')") is None
    admin.execute("RESET check_function_bodies")
    admin.execute('UPDATE own.mine SET "$plpgsql$;CREATE TABLE own.found();SELECT $plpgsql$" = title WHERE id = 1')
    assert drain(admin) == 5


def test_a_domain_over_a_domain_is_not_checked_with_our_rights(
    database: psycopg.Connection, connect: Connect, owner: str
) -> None:
    admin = connect(owner)
    admin.execute(_GRAB)
    admin.execute("CREATE DOMAIN own.one AS integer CHECK (own.grab(VALUE::text)); CREATE DOMAIN own.key AS own.one")
    admin.execute("CREATE TABLE own.keyed (id own.key PRIMARY KEY, body text)")
    create_pipeline(admin, name="keyed", source="own.keyed", content="body")
    admin.execute("INSERT INTO own.keyed VALUES (1, 'one'), (2, 'two')")
    admin.execute("UPDATE own.keyed SET body = 'changed' WHERE id = 1")
    assert drain(admin) == 2
    _assert_nothing_grabbed(database, owner)


def test_a_key_is_of_a_type_whose_casts_no_other_role_makes(
    database: psycopg.Connection, connect: Connect, owner: str
) -> None:
    admin = connect(owner)
    admin.execute("CREATE TYPE own.mood AS ENUM ('glad', 'sad')")
    admin.execute("CREATE TABLE own.keyed (id own.mood PRIMARY KEY, body text)")
    with pytest.raises(errors.InvalidParameterValue, match='column "id"') as caught:
        create_pipeline(admin, name="keyed", source="own.keyed", content="body")
    hint = (caught.value.diag.message_hint or "").removeprefix("As a superuser: ")
    database.execute(hint.encode())
    create_pipeline(admin, name="keyed", source="own.keyed", content="body")
    admin.execute("INSERT INTO own.keyed VALUES ('glad', 'one'), ('sad', 'two')")
    assert drain(admin) == 2


@pytest.mark.parametrize("capture", ["statement", "row"])
def test_a_column_of_another_type_in_place_of_the_key_is_not_cast_with_our_rights(
    database: psycopg.Connection, connect: Connect, owner: str, capture: str
) -> None:
    """The event trigger follows ALTER TABLE; ALTER VIEW renames a table's columns as well, and it does not see that."""
    admin = connect(owner)
    create_pipeline(admin, name="mine", source="own.mine", capture=capture)
    admin.execute(_GRAB)
    for wanted, column in (("integer", "id"), ("text", "body")):
        admin.execute(
            f"CREATE TYPE own.of_{column} AS (x text);"
            f"CREATE FUNCTION own.cast_{column}(v own.of_{column}) RETURNS {wanted} LANGUAGE sql AS"
            f" $$ SELECT CASE WHEN own.grab('') THEN '1' END::{wanted} $$;"
            f"CREATE CAST (own.of_{column} AS {wanted}) WITH FUNCTION own.cast_{column} AS IMPLICIT;"
            f"ALTER TABLE own.mine ADD COLUMN new_{column} own.of_{column};".encode()
        )
    admin.execute("ALTER VIEW own.mine RENAME COLUMN body TO old_body")
    admin.execute("ALTER VIEW own.mine RENAME COLUMN new_body TO body")
    admin.execute("UPDATE own.mine SET old_body = 'changed' WHERE id = 1")
    admin.execute("ALTER VIEW own.mine RENAME COLUMN id TO old_id")
    admin.execute("ALTER VIEW own.mine RENAME COLUMN new_id TO id")
    admin.execute("INSERT INTO own.mine (old_id, id) VALUES (6, ROW('a'))")
    admin.execute("UPDATE own.mine SET old_body = 'changed', id = ROW('b') WHERE old_id = 1")
    admin.execute("DELETE FROM own.mine WHERE old_id = 2")
    _assert_nothing_grabbed(database, owner)
    admin.execute("SELECT embedline.refresh_pipeline('mine')")
    admin.execute("UPDATE own.mine SET old_body = 'changed again' WHERE old_id = 1")
    settle(admin)
    assert scalar(database, f"SELECT content FROM {MINE('chunk')} WHERE key_id = 1").endswith("changed again")


def test_an_upgrade_undoes_what_an_owner_could_once_name(
    database: psycopg.Connection, database_dsn: str, connect: Connect, owner: str
) -> None:
    admin = connect(owner)
    create_pipeline(admin, name="mine", source="own.mine")
    settle(database)
    command.downgrade(alembic_config(database_dsn), "0007")
    admin.execute(f"ALTER FUNCTION {MINE('read')}(integer[], bigint) SECURITY INVOKER")
    command.upgrade(alembic_config(database_dsn), "head")
    assert not scalar(database, "SELECT has_schema_privilege(%s, 'embedline_data', 'USAGE')", (owner,))
    assert scalar(database, "SELECT prosecdef FROM pg_proc WHERE proname = 'mine_read'")
    admin.execute("UPDATE own.mine SET body = 'changed' WHERE id = 1")
    assert drain(connect(owner)) == 1
    assert_exact(database, "mine")


def test_a_temporary_table_of_the_callers_does_not_stand_in_the_way(database: psycopg.Connection) -> None:
    create_pages(database, 1)
    database.execute("CREATE TEMPORARY TABLE embedline_check (id integer)")
    create_pipeline(database)
    assert drain(database) == 1


def test_a_search_path_of_the_callers_does_not_redirect_us(
    database: psycopg.Connection, connect: Connect, owner: str
) -> None:
    admin = connect(owner)
    admin.execute("CREATE FUNCTION own.lower(text) RETURNS text LANGUAGE sql AS $$ SELECT 1 / 0 || $1 $$")
    admin.execute("CREATE FUNCTION own.count() RETURNS bigint LANGUAGE sql AS $$ SELECT 1 / 0 $$")
    admin.execute("CREATE TABLE own.pg_class (oid oid)")
    admin.execute("SET search_path = own, pg_catalog, public")
    create_pipeline(admin, name="mine", source="mine", content="title || body")
    assert drain(admin) == 5
    assert searching(admin, "mine", "rivers", k=1)


@pytest.mark.parametrize(
    "content",
    [
        "body FROM own.mine; ALTER ROLE CURRENT_USER SUPERUSER; SELECT (title",
        "body$$; DROP TABLE page; --$$",
        "own.tag'\\'; DROP TABLE page; --'",
        # An identifier that ends in e, and a string constant of the type that it names.
        "own.tage'\\') AS x FROM own.mine; DROP TABLE page; SELECT (1 --'",
        # Dollar signs are letters within an identifier.
        "body$$) AS x FROM own.mine; DROP TABLE page; SELECT (1 --$$",
        "body$a$) AS x FROM own.mine; DROP TABLE page; SELECT (1 --$a$",
        "body) AS x FROM own.mine; DROP TABLE page; SELECT (1",
    ],
)
def test_an_injection_through_the_content_does_nothing(
    database: psycopg.Connection, connect: Connect, owner: str, content: str
) -> None:
    admin = connect(owner)
    admin.execute('CREATE DOMAIN own."tagE" AS text; CREATE DOMAIN own."tage" AS text; CREATE DOMAIN own.tag AS text')
    admin.execute('ALTER TABLE own.mine ADD COLUMN "body$$" text, ADD COLUMN "body$a$" text')
    admin.execute("SET search_path = own, public")
    with pytest.raises(errors.InvalidParameterValue, match="not a single SQL expression"):
        create_pipeline(admin, name="mine", source="own.mine", content=content)
    assert scalar(database, "SELECT count(*) FROM page") == 5


def test_set_role_counts_as_the_role(database: psycopg.Connection, connect: Connect, owner: str) -> None:
    """A superuser who has taken a lesser role has only that role's rights."""
    database.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(owner)))
    with pytest.raises(errors.InsufficientPrivilege):
        create_pipeline(database, name="theirs", source="page")
    with pytest.raises(errors.InsufficientPrivilege):
        database.execute("SELECT embedline.create_model('x', 'openai', 'x', base_url => 'http://127.0.0.1:1/v1')")
