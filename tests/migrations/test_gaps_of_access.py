"""The list of endpoints on the way back and forward, and objects of others in the way of an installation."""

from __future__ import annotations

import psycopg
import pytest
from alembic import command
from psycopg import conninfo

from conftest import MakeRole
from support import alembic_config, scalar

_COPY = """
    INSERT INTO embedline.model (name, provider, model, dimensions, fingerprint, base_url)
    SELECT 'm' || n, 'openai', 'm', 8, 'f', url FROM unnest(%s::text[]) WITH ORDINALITY AS u (url, n)
"""


def test_models_of_before_keep_their_addresses(database: psycopg.Connection, database_dsn: str) -> None:
    config = alembic_config(database_dsn)
    listed = "SELECT scheme, host, port FROM embedline.allowed_endpoint ORDER BY 1, 2, 3"
    fresh = set(database.execute(listed).fetchall())
    command.downgrade(config, "0027-1")
    urls = [
        *(
            "http://gpu.internal:8000/v1",
            "https://NAME.openai.azure.com/openai?api-version=2024",
            "http://[fd12::1]:8080/v1",
        ),
        *("http://gpu.internal:8000/other", "http://10.0.0.7", "https://api.openai.com/v1"),
    ]
    database.execute(_COPY, (urls,))
    command.upgrade(config, "head")
    assert set(database.execute(listed).fetchall()) - fresh == {
        ("http", "gpu.internal", 8000),
        ("https", "name.openai.azure.com", 443),
        ("http", "fd12::1", 8080),
        ("http", "10.0.0.7", 80),
    }


@pytest.mark.parametrize(
    "place", ["schema embedline", "function embedline.search(text)", "function public.embed_pending(integer,text)"]
)
def test_what_another_role_has_put_in_the_way_is_refused(
    empty_database_dsn: str, make_role: MakeRole, place: str
) -> None:
    role, (kind, name) = make_role(), place.split(" ")
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA embedline")
        if kind == "schema":
            connection.execute(f"ALTER SCHEMA embedline OWNER TO {role}")
        else:
            connection.execute(f"CREATE FUNCTION {name} RETURNS integer LANGUAGE sql AS 'SELECT 1'")
            connection.execute(f"ALTER FUNCTION {name} OWNER TO {role}")
    with pytest.raises(SystemExit, match=f'belongs to role "{role}", who is no superuser'):
        command.upgrade(alembic_config(empty_database_dsn), "head")


def test_names_of_the_sessions_search_path_stand_for_nothing_in_an_upgrade(empty_database_dsn: str) -> None:
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA evil; CREATE TABLE evil.called (name text)")
        for function in ("current_database()", "quote_ident(text)", "clock_timestamp()", "to_regclass(text)", "now()"):
            connection.execute(
                f"CREATE FUNCTION evil.{function} RETURNS text LANGUAGE plpgsql"
                f" AS $$ BEGIN INSERT INTO evil.called VALUES ('{function}'); RETURN 'x'; END $$"
            )
        connection.execute(
            "CREATE FUNCTION evil.same(text, text) RETURNS boolean LANGUAGE plpgsql"
            " AS $$ BEGIN INSERT INTO evil.called VALUES ('='); RETURN true; END $$;"
            "CREATE OPERATOR evil.= (FUNCTION = evil.same, LEFTARG = text, RIGHTARG = text)"
        )
    hostile = conninfo.make_conninfo(empty_database_dsn, options="-csearch_path=evil,pg_catalog,public")
    parts = conninfo.conninfo_to_dict(hostile)
    url = f"postgresql://{parts['user']}:{parts['password']}@{parts['host']}:{parts['port']}/{parts['dbname']}"
    command.upgrade(alembic_config(f"{url}?options=-csearch_path%3Devil,pg_catalog,public"), "head")
    with psycopg.connect(empty_database_dsn) as connection:
        assert connection.execute("SELECT DISTINCT name FROM evil.called").fetchall() == []
        assert scalar(connection, "SELECT count(*) > 50 FROM pg_proc WHERE pronamespace = 'embedline'::regnamespace")
