"""A database and a session that go from test to test: emptied after each, and kept only if nothing tells them from new ones.

A clone of the template costs 0.03 s of CPU. The first statements of a session in it cost 0.4 s: imports, a tokenizer of
3.5 MB. So the tests of a process share one session, which keeps its imports. What a test left is removed: objects, rows,
settings, locks, everything that the session remembers. Then the whole catalogue and all rows of Embedline's tables are
compared with those of the new clone. Where they differ, for whatever reason, the next test gets a new clone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager

import psycopg
from psycopg import pq, sql

# Tests that share a session, so that what a process might gather comes to an end.
_MOST_TESTS = 200
_FIRST_USER_OID = 16384
# Columns that tell an object, by catalogue. Counters and hints that vacuum or a dropped object leave are no part of them.
_OBJECTS = {
    "pg_class": "oid, relname, relnamespace, relowner, relkind, relacl, reloptions, relrowsecurity, relforcerowsecurity,"
    " relreplident, relispartition, relpersistence, relnatts, relchecks, reltoastrelid",
    "pg_proc": "oid, proname, pronamespace, proowner, proacl, proconfig, prosecdef, provolatile, md5(prosrc), prosqlbody",
    "pg_type": "oid, typname, typnamespace, typowner, typacl, typtype, typdefault",
    "pg_constraint": "oid, conname, conrelid, contype, convalidated, conbin",
    "pg_trigger": "oid, tgrelid, tgname, tgfoid, tgenabled, tgattr",
    "pg_rewrite": "oid, ev_class, ev_enabled, md5(ev_action)",
    "pg_attrdef": "oid, adrelid, adnum, adbin",
    "pg_policy": "oid, polname, polrelid, polqual",
    "pg_event_trigger": "oid, evtname, evtenabled, evtowner",
    "pg_extension": "oid, extname, extnamespace, extversion",
    "pg_default_acl": "oid, defaclrole, defaclnamespace, defaclobjtype, defaclacl",
    "pg_publication": "oid, pubname",
    "pg_statistic_ext": "oid, stxname",
    "pg_cast": "oid, castfunc",
    "pg_operator": "oid, oprname, oprowner",
    "pg_opclass": "oid, opcname, opcowner",
    "pg_collation": "oid, collname, collowner",
    "pg_conversion": "oid, conname",
    "pg_ts_config": "oid, cfgname",
    "pg_ts_dict": "oid, dictname",
    "pg_foreign_data_wrapper": "oid, fdwname",
    "pg_foreign_server": "oid, srvname",
}
_CATALOGUE = [
    *(
        f"SELECT '{name}', md5(string_agg(ROW({columns})::text, ';' ORDER BY oid)) FROM pg_catalog.{name}"
        f" WHERE oid >= {_FIRST_USER_OID}"
        for name, columns in _OBJECTS.items()
    ),
    "SELECT 'pg_attribute', md5(string_agg(ROW(attrelid, attnum, attname, atttypid, atttypmod, attnotnull, atthasdef, attacl,"
    " attoptions, attstattarget, attisdropped, attstorage)::text, ';' ORDER BY attrelid, attnum)) FROM pg_catalog.pg_attribute"
    f" WHERE attrelid >= {_FIRST_USER_OID}",
    "SELECT 'pg_index', md5(string_agg(ROW(indexrelid, indisvalid, indisready, indislive, indisclustered, indisreplident,"
    f" indisunique)::text, ';' ORDER BY indexrelid)) FROM pg_catalog.pg_index WHERE indexrelid >= {_FIRST_USER_OID}",
    "SELECT 'pg_inherits', md5(string_agg(i::text, ';' ORDER BY inhrelid)) FROM pg_catalog.pg_inherits AS i",
    "SELECT 'pg_enum', md5(string_agg(e::text, ';' ORDER BY oid)) FROM pg_catalog.pg_enum AS e",
    "SELECT 'pg_description', md5(string_agg(d::text, ';' ORDER BY objoid, classoid, objsubid))"
    f" FROM pg_catalog.pg_description AS d WHERE objoid >= {_FIRST_USER_OID}",
    "SELECT 'pg_namespace', md5(string_agg(ROW(oid, nspname, nspowner, nspacl)::text, ';' ORDER BY oid))"
    " FROM pg_catalog.pg_namespace WHERE nspname !~ '^pg_(toast_)?temp_'",
    "SELECT 'pg_language', md5(string_agg(ROW(oid, lanname, lanacl)::text, ';' ORDER BY oid)) FROM pg_catalog.pg_language",
    "SELECT 'rights on the catalogue', md5(string_agg(ROW(oid, relacl)::text, ';' ORDER BY oid)) FROM pg_catalog.pg_class"
    f" WHERE oid < {_FIRST_USER_OID} AND relacl IS NOT NULL",
    "SELECT 'rights on built-in functions', md5(string_agg(ROW(oid, proacl)::text, ';' ORDER BY oid)) FROM pg_catalog.pg_proc"
    f" WHERE oid < {_FIRST_USER_OID} AND proacl IS NOT NULL",
    "SELECT 'pg_publication_rel', count(*)::text FROM pg_catalog.pg_publication_rel",
    "SELECT 'pg_largeobject', count(*)::text FROM pg_catalog.pg_largeobject_metadata",
    "SELECT 'pg_prepared_xacts', count(*)::text FROM pg_catalog.pg_prepared_xacts WHERE database = current_database()",
    "SELECT 'settings', string_agg(ROW(setrole, setconfig)::text, ';' ORDER BY setrole) FROM pg_catalog.pg_db_role_setting"
    " WHERE setdatabase = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())",
    "SELECT 'pg_database', ROW(datdba, datacl, datconnlimit, datallowconn)::text FROM pg_catalog.pg_database"
    " WHERE datname = current_database()",
]
_NEW_SCHEMAS = """
    SELECT format('%%I', nspname) FROM pg_catalog.pg_namespace
    WHERE NOT oid = ANY(%s) AND nspname !~ '^pg_(toast_)?temp_'
"""
_NEW_RELATIONS = """
    SELECT relkind::text, array_agg(format('%%I.%%I', nspname, relname))
    FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = relnamespace
    WHERE relkind IN ('r', 'p', 'f', 'v', 'm', 'S') AND NOT c.oid = ANY(%s) AND nspname !~ '^pg_(toast_)?temp_'
    GROUP BY 1 ORDER BY position(relkind::text IN 'vmfprS')
"""
_NEW_ROUTINES = "SELECT p.oid::regprocedure::text FROM pg_catalog.pg_proc AS p WHERE NOT oid = ANY(%s)"
_NEW_TYPES = """
    SELECT format('%%I.%%I', nspname, typname)
    FROM pg_catalog.pg_type AS t JOIN pg_catalog.pg_namespace AS n ON n.oid = typnamespace
    WHERE typtype IN ('c', 'e', 'd', 'r') AND NOT t.oid = ANY(%s) AND nspname !~ '^pg_(toast_)?temp_'
        AND (typrelid = 0 OR EXISTS (SELECT FROM pg_catalog.pg_class WHERE oid = typrelid AND relkind = 'c'))
"""
_KINDS = {"r": "TABLE", "p": "TABLE", "f": "FOREIGN TABLE", "v": "VIEW", "m": "MATERIALIZED VIEW", "S": "SEQUENCE"}
_TABLES = """
    SELECT c.oid::regclass::text FROM pg_catalog.pg_class AS c
    WHERE relkind = 'r' AND relnamespace = 'embedline'::regnamespace ORDER BY 1
"""
_SEQUENCES = """
    SELECT c.oid::regclass::text FROM pg_catalog.pg_class AS c
    WHERE relkind = 'S' AND relnamespace = 'embedline'::regnamespace ORDER BY 1
"""
# Ends other sessions and waits for their ends; usually they are on their way already.
_END_OTHERS = """
    SELECT pg_catalog.pg_terminate_backend(pid, 10000) FROM pg_catalog.pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
# What a session remembers of its database. Clients of providers have threads and sockets.
_FORGET = """
    DO LANGUAGE plpython3u $python$
def close(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            close(item)
    elif hasattr(value, "close"):
        value.close()
for value in list(GD.values()):
    close(value)
GD.clear()
$python$
"""

Clone = Callable[[], AbstractContextManager[str]]


class RecycledDatabase:
    """The database of a process's tests, one after the other, and the session in which they begin."""

    def __init__(self, clone: Clone) -> None:
        """`clone` makes a new database for the length of a block and returns its URI, for a superuser."""
        self._clone = clone
        self._database = contextlib.ExitStack()
        self._dsn: str | None = None
        self._handle: pq.abc.PGconn | None = None
        # Objects that gave access to the session: one without it would warn of a connection that was not closed.
        self._given: list[psycopg.Connection] = []
        self._tests = 0
        self.clones = 0
        self.differences: list[str] = []

    @contextlib.contextmanager
    def lend(self, roles: Collection[str]) -> Iterator[str]:
        """Return the URI of a database that is as the template is; `roles` names at the block's end those made meanwhile."""
        if self._dsn is None:
            self._renew()
        assert self._dsn is not None
        self._tests += 1
        try:
            yield self._dsn
        finally:
            try:
                is_new = self._tests < _MOST_TESTS and self._restore(list(roles))
            except psycopg.Error as error:
                self.differences.append(str(error))
                is_new = False
            if not is_new:
                self.close()

    def session(self, dsn: str) -> psycopg.Connection | None:
        """Return the warm session, if it belongs to this database and no test has closed it; each test asks once."""
        if dsn != self._dsn:
            return None
        return self._open_session()

    def close(self) -> None:
        """Close the session and drop the database."""
        if self._handle is not None:
            self._handle.finish()
        self._handle, self._dsn = None, None
        self._given.clear()
        self._database.close()

    def _open_session(self) -> psycopg.Connection:
        if self._handle is None or self._handle.status != pq.ConnStatus.OK:
            assert self._dsn is not None
            opened = psycopg.connect(self._dsn, autocommit=True)
            self._handle = opened.pgconn
        else:
            # A new object on the same session: handlers of notices, prepared statements and adapters are the test's own.
            opened = psycopg.Connection(self._handle)
            self._given.append(opened)
            opened.rollback()
            opened.autocommit = True
        self._given.append(opened)
        return opened

    def _renew(self) -> None:
        self._database = contextlib.ExitStack()
        self._dsn = self._database.enter_context(self._clone())
        self.clones += 1
        self._tests = 0
        connection = self._open_session()
        self._known = {
            name: [row[0] for row in connection.execute(f"SELECT oid FROM pg_catalog.{name}")]
            for name in ("pg_namespace", "pg_class", "pg_proc", "pg_type")
        }
        tables = [row[0] for row in connection.execute(_TABLES)]
        self._sequences = [row[0] for row in connection.execute(_SEQUENCES)]
        self._rows = {table: self._copy_out(connection, table) for table in tables}
        self._versions = " UNION ALL ".join(
            f"SELECT '{t}', coalesce(array_agg(ROW(ctid, xmin)::text), '{{}}') FROM {t}" for t in tables
        )
        self._positions = " UNION ALL ".join(f"SELECT '{s}', last_value, is_called FROM {s}" for s in self._sequences)
        self._first_versions = self._row_versions(connection)
        self._first_positions = set(connection.execute(self._positions).fetchall())
        self._first_contents = {table: self._content(connection, table) for table in tables}
        self._template = self._fingerprint(connection)

    @staticmethod
    def _fingerprint(connection: psycopg.Connection) -> dict[str, str | None]:
        return dict(connection.execute(" UNION ALL ".join(_CATALOGUE)).fetchall())

    def _row_versions(self, connection: psycopg.Connection) -> dict[str, set[str]]:
        """Return the place and the transaction of each table's row versions.

        A version never changes: to compare these is to compare the rows, of which a model's has a tokenizer of 1.3 MB.
        """
        return {table: set(versions) for table, versions in connection.execute(self._versions)}

    @staticmethod
    def _content(connection: psycopg.Connection, table: str) -> str | None:
        """Return the hash of a table's rows."""
        query = f"SELECT md5(string_agg(t::text, ';' ORDER BY t::text)) FROM {table} AS t"
        return connection.execute(query.encode()).fetchone()[0]

    @staticmethod
    def _copy_out(connection: psycopg.Connection, table: str) -> bytes:
        with connection.cursor().copy(f"COPY {table} TO STDOUT") as copy:
            return b"".join(bytes(part) for part in copy)

    def _restore(self, roles: list[str]) -> bool:
        """Empty the database and the session; return whether nothing tells them from new ones."""
        if self._handle is not None and self._handle.transaction_status == pq.TransactionStatus.ACTIVE:
            return False
        connection = self._open_session()
        connection.execute("DISCARD ALL")
        for (gid,) in connection.execute(
            "SELECT gid FROM pg_catalog.pg_prepared_xacts WHERE database = current_database()"
        ).fetchall():
            connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(gid))
        connection.execute(_END_OTHERS)
        with connection.transaction():
            # Neither triggers nor event triggers: what they would do is removed anyway.
            connection.execute("SET LOCAL session_replication_role = replica")
            connection.execute("SET LOCAL client_min_messages = error")
            self._drop_new_objects(connection, roles)
            self._put_rows_back(connection)
        connection.execute(_FORGET)
        connection.execute("DISCARD ALL")
        found = self._fingerprint(connection)
        different = [name for name in found if found[name] != self._template.get(name)]
        different += self._different_contents(connection)
        self.differences += different
        return not different and found.keys() == self._template.keys()

    def _drop_new_objects(self, connection: psycopg.Connection, roles: list[str]) -> None:
        for role in roles:
            connection.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(role)))
        for (name,) in connection.execute("SELECT format('%I', pubname) FROM pg_catalog.pg_publication").fetchall():
            connection.execute(f"DROP PUBLICATION {name}".encode())
        for (name,) in connection.execute(_NEW_SCHEMAS, (self._known["pg_namespace"],)).fetchall():
            connection.execute(f"DROP SCHEMA {name} CASCADE".encode())
        for kind, names in connection.execute(_NEW_RELATIONS, (self._known["pg_class"],)).fetchall():
            connection.execute(f"DROP {_KINDS[kind]} IF EXISTS {', '.join(names)} CASCADE".encode())
        routines = [row[0] for row in connection.execute(_NEW_ROUTINES, (self._known["pg_proc"],))]
        if routines:
            connection.execute(f"DROP ROUTINE {', '.join(routines)} CASCADE".encode())
        types = [row[0] for row in connection.execute(_NEW_TYPES, (self._known["pg_type"],))]
        if types:
            connection.execute(f"DROP TYPE {', '.join(types)} CASCADE".encode())

    def _put_rows_back(self, connection: psycopg.Connection) -> None:
        for table, versions in self._row_versions(connection).items():
            first = self._first_versions[table]
            if not first <= versions:
                connection.execute(f"DELETE FROM {table}".encode())
                with connection.cursor().copy(f"COPY {table} FROM STDIN") as copy:
                    copy.write(self._rows[table])
            elif versions != first:
                added = "ROW(ctid, xmin)::text = ANY(%s)"
                connection.execute(f"DELETE FROM {table} WHERE {added}".encode(), (list(versions - first),))
        for name, value, is_called in set(connection.execute(self._positions)) ^ self._first_positions:
            if (name, value, is_called) in self._first_positions:
                connection.execute("SELECT pg_catalog.setval(%s::regclass, %s, %s)", (name, value, is_called))

    def _different_contents(self, connection: psycopg.Connection) -> list[str]:
        """Return the tables and sequences that are not as in the template.

        The new versions of equal rows are noted.
        """
        versions = self._row_versions(connection)
        different = []
        for table, first in self._first_versions.items():
            if versions[table] == first:
                continue
            if self._content(connection, table) == self._first_contents[table]:
                self._first_versions[table] = versions[table]
            else:
                different.append(table)
        positions = set(connection.execute(self._positions))
        return different + [name for name, *_ in positions - self._first_positions]
