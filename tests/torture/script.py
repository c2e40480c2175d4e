"""The statements that a client of the torture runs: drawn from a seed alone, so that a seed gives the same ones again.

Nothing that the server answers changes what comes next. A transaction that fails is rolled back, and the next one follows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ISOLATION_LEVELS = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
# Keys that all clients write to, and the first of those that each has for itself, a hundred of them.
_SHARED_KEYS, _OWN_KEYS = 300, 1000
_TENANTS = 3
# Characters of a body that an append keeps: bodies stay short however often they are edited.
_KEPT_CHARACTERS = 500
# Most seconds between two transactions of a client.
_LONGEST_PAUSE = 0.1
_WORDS = (
    "river mountain database violin bread rocket law garden window engine letter harbour market winter pencil orchard"
    " bridge copper lantern meadow needle ocean pepper quarry ribbon saddle timber umbrella valley whistle café größe"
)


@dataclass(frozen=True)
class Statement:
    """One statement: its kind, for the table of the run, and either values for its text or rows to COPY."""

    kind: str
    text: str
    values: tuple[object, ...] = ()
    rows: tuple[tuple[object, ...], ...] = ()


@dataclass(frozen=True)
class Transaction:
    """Statements of one transaction, its isolation level, how it ends, and the seconds to wait before it."""

    isolation: str
    statements: tuple[Statement, ...]
    commits: bool
    pause: float


@dataclass(frozen=True)
class Source:
    """A table that the torture writes to; `partitions` are the bounds between its partitions."""

    name: str
    keys: tuple[str, ...]
    create: str
    partitions: tuple[int, ...] = ()


PLAIN = Source(
    "plain", ("id",), "CREATE TABLE plain (id integer PRIMARY KEY, body text, views integer NOT NULL DEFAULT 0)"
)
PARTED = Source(
    "parted",
    ("id",),
    "CREATE TABLE parted (id integer PRIMARY KEY, body text, views integer NOT NULL DEFAULT 0) PARTITION BY RANGE (id)",
    (0, 150, 300, 2000),
)
# The name has what a key's text form quotes.
PAIR = Source(
    "pair",
    ("tenant", "name"),
    "CREATE TABLE pair (tenant integer, name text, body text, views integer NOT NULL DEFAULT 0,"
    " live boolean NOT NULL DEFAULT true, PRIMARY KEY (tenant, name))",
)
SOURCES = (PLAIN, PARTED, PAIR)


def key_of(source: Source, number: int) -> tuple[object, ...]:
    """Return the key with a number."""
    return (number,) if len(source.keys) == 1 else (number % _TENANTS, f'n,{number}"')


class Script:
    """The endless sequence of transactions of one client."""

    def __init__(self, seed: int, client: int) -> None:
        self._client = client
        self._rng = random.Random(f"{seed} {client}")
        self._texts = 0
        self._words = _WORDS.split()

    def __iter__(self) -> Iterator[Transaction]:
        """Yield the transactions."""
        while True:
            isolation = self._rng.choices(ISOLATION_LEVELS, (6, 3, 2))[0]
            statements: list[Statement] = []
            for _ in range(self._rng.randrange(1, 5)):
                statements += self._within_savepoint() if self._rng.random() < 0.15 else self._any()
            pause = self._rng.uniform(0, _LONGEST_PAUSE)
            yield Transaction(isolation, tuple(statements), self._rng.random() >= 0.1, pause)

    def _within_savepoint(self) -> list[Statement]:
        ends = "ROLLBACK TO SAVEPOINT s" if self._rng.random() < 0.7 else "RELEASE SAVEPOINT s"
        return [Statement("savepoint", "SAVEPOINT s"), *self._any(), Statement("savepoint", ends)]

    def _any(self) -> list[Statement]:
        source = self._rng.choice(SOURCES)
        kinds: dict[Callable[[Source], list[Statement]], float] = {
            self._insert: 10,
            self._insert_many: 4,
            self._upsert: 10,
            self._merge: 4,
            self._copy: 2,
            self._update: 20,
            self._append_many: 4,
            self._empty: 2,
            self._unrelated: 5,
            self._delete: 10,
            self._delete_many: 3,
            self._change_key: 10,
            self._swap_keys: 3,
            self._reload: 5,
            self._truncate: 0.15,
        }
        if source is PAIR:
            kinds[self._toggle] = 5
        return self._rng.choices(list(kinds), list(kinds.values()))[0](source)

    def _body(self, source: Source) -> str:
        """Return a text that no other statement of any client has."""
        self._texts += 1
        mark = f"{source.name} {self._client} {self._texts}"
        words = self._rng.choices(self._words, k=self._rng.randrange(2, 60))
        return f"{mark} {' '.join(words)}."

    def _number(self) -> int:
        return self._rng.randrange(_SHARED_KEYS)

    def _own_number(self) -> int:
        return _OWN_KEYS + 100 * self._client + self._rng.randrange(100)

    def _range(self) -> tuple[int, int]:
        first = self._number()
        return first, first + self._rng.randrange(2, 12)

    def _key(self, source: Source) -> tuple[object, ...]:
        return key_of(source, self._number())

    def _insert(self, source: Source) -> list[Statement]:
        # One in ten may meet a row: the application's own mistake, which ends its transaction.
        clash = "" if self._rng.random() < 0.1 else " ON CONFLICT DO NOTHING"
        values = (*self._key(source), self._body(source))
        return [Statement("insert", f"INSERT INTO {_target(source)} VALUES ({_marks(values)}){clash}", values)]

    def _insert_many(self, source: Source) -> list[Statement]:
        first, last = self._range()
        rows = [(*key_of(source, number), self._body(source)) for number in range(first, last)]
        values = tuple(value for row in rows for value in row)
        lists = ", ".join(f"({_marks(row)})" for row in rows)
        return [Statement("insert", f"INSERT INTO {_target(source)} VALUES {lists} ON CONFLICT DO NOTHING", values)]

    def _upsert(self, source: Source) -> list[Statement]:
        values = (*self._key(source), self._body(source))
        text = (
            f"INSERT INTO {_target(source)} VALUES ({_marks(values)}) ON CONFLICT ({', '.join(source.keys)})"
            " DO UPDATE SET body = excluded.body"
        )
        return [Statement("upsert", text, values)]

    def _merge(self, source: Source) -> list[Statement]:
        values = (*self._key(source), self._body(source))
        columns = ", ".join((*source.keys, "body"))
        joined = " AND ".join(f"t.{key} = n.{key}" for key in source.keys)
        text = (
            f"MERGE INTO {source.name} AS t USING (SELECT {_typed(source)}) AS n ({columns}) ON {joined}"
            " WHEN MATCHED AND length(t.body) > 250 THEN DELETE WHEN MATCHED THEN UPDATE SET body = n.body"
            f" WHEN NOT MATCHED THEN INSERT ({columns}) VALUES ({', '.join(f'n.{c}' for c in (*source.keys, 'body'))})"
        )
        return [Statement("merge", text, values)]

    def _copy(self, source: Source) -> list[Statement]:
        first = self._own_number()
        keys = [key_of(source, number) for number in range(first, first + self._rng.randrange(5, 25))]
        rows = tuple((*key, self._body(source)) for key in keys)
        values = tuple(value for key in keys for value in key)
        lists = ", ".join(f"({_marks(key)})" for key in keys)
        delete = f"DELETE FROM {source.name} WHERE ({', '.join(source.keys)}) IN ({lists})"
        return [
            Statement("delete", delete, values),
            Statement("copy", f"COPY {_target(source)} FROM STDIN", rows=rows),
        ]

    def _update(self, source: Source) -> list[Statement]:
        text = f"UPDATE {source.name} SET body = %s WHERE {_match(source)}"
        return [Statement("update", text, (self._body(source), *self._key(source)))]

    def _append_many(self, source: Source) -> list[Statement]:
        """Change the end of some bodies, so that their first chunks stay."""
        first, last = self._range()
        text = f"UPDATE {source.name} SET body = left(body, {_KEPT_CHARACTERS}) || ' ' || %s WHERE {_between(source)}"
        return [Statement("update", text, (self._body(source), first, last))]

    def _empty(self, source: Source) -> list[Statement]:
        return [Statement("update", f"UPDATE {source.name} SET body = NULL WHERE {_match(source)}", self._key(source))]

    def _toggle(self, source: Source) -> list[Statement]:
        return [
            Statement("filter", f"UPDATE {source.name} SET live = NOT live WHERE {_match(source)}", self._key(source))
        ]

    def _unrelated(self, source: Source) -> list[Statement]:
        text = f"UPDATE {source.name} SET views = views + 1 WHERE {_between(source)}"
        return [Statement("unrelated", text, self._range())]

    def _delete(self, source: Source) -> list[Statement]:
        return [Statement("delete", f"DELETE FROM {source.name} WHERE {_match(source)}", self._key(source))]

    def _delete_many(self, source: Source) -> list[Statement]:
        return [Statement("delete", f"DELETE FROM {source.name} WHERE {_between(source)}", self._range())]

    def _change_key(self, source: Source) -> list[Statement]:
        return [_moved(source, self._key(source), self._key(source))]

    def _swap_keys(self, source: Source) -> list[Statement]:
        """Have two rows change places, by way of a key that is this client's alone."""
        one, other, aside = self._key(source), self._key(source), key_of(source, self._own_number())
        return [_moved(source, one, aside), _moved(source, other, one), _moved(source, aside, other)]

    def _reload(self, source: Source) -> list[Statement]:
        text = (
            f"WITH gone AS (DELETE FROM {source.name} WHERE {_between(source)} RETURNING *)"
            f" INSERT INTO {source.name} SELECT * FROM gone"
        )
        return [Statement("reload", text, self._range())]

    def _truncate(self, source: Source) -> list[Statement]:
        return [Statement("truncate", f"TRUNCATE {source.name}")]


def _target(source: Source) -> str:
    return f"{source.name} ({', '.join(source.keys)}, body)"


def _marks(values: tuple[object, ...]) -> str:
    return ", ".join("%s" for _ in values)


def _typed(source: Source) -> str:
    return "%s::integer, %s::text" if len(source.keys) == 1 else "%s::integer, %s::text, %s::text"


def _match(source: Source) -> str:
    return " AND ".join(f"{key} = %s" for key in source.keys)


def _between(source: Source) -> str:
    """Return the condition on some keys; those of pairs go by the number in the name."""
    number = "id" if len(source.keys) == 1 else "substring(name, '[0-9]+')::integer"
    return f"{number} >= %s AND {number} < %s"


def _moved(source: Source, old: tuple[object, ...], new: tuple[object, ...]) -> Statement:
    keys = ", ".join(f"{key} = %s" for key in source.keys)
    free = f"NOT EXISTS (SELECT FROM {source.name} WHERE {_match(source)})"
    return Statement(
        "key change", f"UPDATE {source.name} SET {keys} WHERE {_match(source)} AND {free}", (*new, *old, *new)
    )


def digest(seed: int, client: int, transactions: int) -> str:
    """Return a hash of a client's first transactions: equal for equal seeds."""
    found = hashlib.sha256()
    for _, transaction in zip(range(transactions), Script(seed, client), strict=False):
        found.update(repr(transaction).encode())
    return found.hexdigest()[:12]
