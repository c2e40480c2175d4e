"""Every function that a role may call is given hostile values, one parameter after the other.

No call harms what is not its own, none ends in an error of the server or of Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from conftest import Connect, MakeRole
from support import CONTENT, create_pages, create_pipeline, drain, scalar

DROP = "DROP TABLE canary"
_TEXTS = (
    f"'; {DROP}; --",
    f'"; {DROP}; --',
    f"$$; {DROP}; $$",
    f"page'); {DROP}; --",
    f"1 FROM canary); {DROP}; --",
    "%s %(x)s {0} {name!r} \\",
    '"Order by" ☃ 名前',
    "select",
    "n" * 63,
    "n" * 5000,
    "",
    "\x01\x1b[31m\u202e\ufeff\U0010ffff",
)
_HOSTILE: dict[str, tuple[Any, ...]] = {
    "text": _TEXTS,
    "name": _TEXTS[:4],
    "text[]": ([f"'; {DROP}; --", ""], [None], []),
    "jsonb": (
        "null", "[]", "1e300", '"x"', '{"a": {"b": [1, null]}}', '{"%s": "\'"}', '[{"chunking": "x"}]', "[null]",
        "[" * 500 + "]" * 500, '{"max_tokens": -1, "extra_body": "x"}',
    ),
    "regclass": (0, 4294967295, 1259),
    "integer": (-2147483648, -1, 0, 2147483647),
    "smallint": (-1, 32767),
    "bigint": (-(2**63), -1, 2**63 - 1),
    "bigint[]": ([], [-1], [2**63 - 1]),
    "double precision": ("NaN", "Infinity", "-Infinity", "-1", "1e308"),
    "real": ("NaN", "-1"),
    "numeric": ("NaN", "-1", "1e1000"),
    "interval": ("-1 day", "178000000 years"),
    "uuid[]": ([], ["00000000-0000-0000-0000-000000000000"]),
    "bytea[]": ([], [b""], [b"\x00" * 7]), "bytea": (b"", b"\x00" * 7, b"\xff" * 1024),
    "boolean": (None,),
    "time without time zone": ("24:00",),
}  # fmt: skip
# Values with which a function gets as far as it can.
_LIKELY = {
    "name": "page", "pipeline": "page", "pipeline_name": "page", "model": "static-256", "model_name": "static-256",
    "content": CONTENT, "source": "page", "query": "rivers", "statement": "ALTER TABLE page ADD COLUMN extra integer",
    "chunking": "recursive", "period": "day", "mode": "vector", "task": "embed", "key": '{"id": "1"}', "kind": "canary",
    "canaries": "page", "events": "page", "subject": "id", "item_key": "id", "provider": "sentence-transformers",
}  # fmt: skip
_OF_TYPE = {
    "text": "page", "integer": 1, "bigint": 1, "double precision": 0.5, "real": 0.5, "numeric": 1, "boolean": False,
    "regclass": "page", "jsonb": "[]", "interval": "1 day", "text[]": ["a"], "bigint[]": [1], "name": "id", "smallint": 1,
    "uuid[]": [], "bytea[]": [], "bytea": b"", "time without time zone": "03:00",
}  # fmt: skip
_ROUTINES = """
    SELECT p.proname::text, p.proargnames[1:p.pronargs], ARRAY(SELECT format_type(t, NULL) FROM unnest(p.proargtypes) AS t),
        p.pronargdefaults
    FROM pg_proc AS p
    WHERE p.pronamespace = 'embedline'::regnamespace AND p.prokind = 'f' AND p.prorettype <> 'trigger'::regtype
        AND p.prorettype <> 'event_trigger'::regtype AND has_function_privilege(p.oid, 'EXECUTE')
    ORDER BY 1, p.oid
"""
# Classes of errors that are ours, of a wrong value, of a name, an expression or a right, or of a feature that is not there.
_CLEAR = ("EL", "22", "23", "42", "0A", "55", "57014", "54", "2B", "3D", "3F")


def _calls(session: psycopg.Connection) -> Iterator[tuple[str, list[tuple[str, str, Any]]]]:
    """Yield each function with parameters of which one is hostile."""
    for function, names, kinds, defaults in session.execute(_ROUTINES).fetchall():
        parameters = list(zip(names or [], kinds, strict=True))
        required = len(parameters) - defaults
        for place, (name, kind) in enumerate(parameters):
            for value in _HOSTILE[kind]:
                given = [
                    (other, type_of, _LIKELY.get(other, _OF_TYPE[type_of]))
                    for number, (other, type_of) in enumerate(parameters)
                    if number < required and number != place
                ]
                yield function, [*given, (name, kind, value)]


def _call(session: psycopg.Connection, function: str, given: list[tuple[str, str, Any]]) -> psycopg.Error | None:
    arguments = sql.SQL(", ").join(
        sql.SQL("{} => {}::{}").format(sql.Identifier(name), sql.Placeholder(), sql.SQL(kind))
        for name, kind, _ in given
    )
    statement = sql.SQL("SELECT * FROM embedline.{}({})").format(sql.Identifier(function), arguments)
    try:
        with session.transaction(force_rollback=True):
            session.execute(statement, [value for _, _, value in given])
    except psycopg.Error as error:
        return error
    return None


@pytest.mark.parametrize("group", ["embedline_reader", "embedline_remote", "embedline_admin"])
def test_no_value_harms_or_ends_in_an_error_of_the_server(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole, group: str
) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    drain(database)
    role = make_role(group)
    if group == "embedline_admin":
        database.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(role)))
        database.execute(sql.SQL("ALTER TABLE page OWNER TO {}").format(sql.Identifier(role)))
    elif group == "embedline_remote":
        database.execute("SELECT embedline.grant_remote('page', %s)", (role,))
    else:
        database.execute(sql.SQL("GRANT SELECT ON page TO {}").format(sql.Identifier(role)))
    database.execute("CREATE TABLE canary AS SELECT 1 AS n")
    session = connect(role)
    session.execute("SET statement_timeout = '20s'")
    unclear, functions, count = [], set(), 0
    for function, given in _calls(session):
        error = _call(session, function, given)
        functions.add(function)
        count += 1
        if error is not None:
            told = f"{error.diag.message_primary} {error.diag.message_detail} {error.diag.message_hint}"
            is_clear = (error.sqlstate or "").startswith(_CLEAR) and "Traceback" not in told and "Error:" not in told
            if not is_clear:
                unclear.append((function, [str(value)[:60] for _, _, value in given], error.sqlstate, told[:300]))
    assert unclear == []
    assert count > {"embedline_reader": 100, "embedline_remote": 50, "embedline_admin": 1500}[group]
    assert database.execute("SELECT n FROM canary").fetchall() == [(1,)]
    assert scalar(database, "SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = %s", (role,)) is False
    assert scalar(database, "SELECT count(*) FROM page_embedding") == 5
