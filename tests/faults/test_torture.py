"""The short form of `make torture`: writes, kills, and every row computed again; and that its check finds what is wrong."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

import psycopg
import pytest

from embedline.dev.cluster.server import Cluster
from fault_table import note
from generated_names import Generated
from killing import reconnect
from stub_provider import stub_provider
from support import settle
from torture.check import check
from torture.run import DIMENSIONS, Run, judge, torture
from torture.script import SOURCES, digest

SECONDS = 60
# Another one each time: a failure prints it.
SEED = secrets.randbelow(10**6)
PLAIN, PARTED, PAIR = Generated("plain"), Generated("parted"), Generated("pair")


@pytest.fixture(scope="module")
def run(own_cluster: Cluster) -> Run:
    """A run on the module's server."""
    return torture(own_cluster, SEED, SECONDS)


def test_nothing_is_lost_stale_or_twice_after_random_writes_and_kills(run: Run) -> None:
    judge(run)
    note(run.found.rows, run.found.over, run.may_be_over)
    assert sum(run.kills.values()) > 0


def test_a_seed_gives_the_same_statements_again() -> None:
    assert digest(1, 0, 200) == digest(1, 0, 200)
    assert len({digest(seed, client, 200) for seed in (1, 2) for client in range(8)}) == 16


# Each is damage after a run that was sound, and what the check has to call it.
DAMAGE = {
    "a vector is gone": (f"DELETE FROM {PLAIN('v1')} WHERE chunk_id = (SELECT min(chunk_id) FROM {PLAIN('v1')})", "missing"),
    "a vector is another's": (
        f"UPDATE {PARTED('v1')} SET embedding_v1 = (SELECT embedding_v1 FROM {PARTED('v1')} ORDER BY chunk_id LIMIT 1)"
        f" WHERE chunk_id = (SELECT max(chunk_id) FROM {PARTED('v1')})",
        "stale",
    ),
    "a text is another": (
        f"UPDATE {PAIR('chunk')} SET content = content || '!' WHERE chunk_id = (SELECT min(chunk_id) FROM {PAIR('chunk')})",
        "stale",
    ),
    "a row is gone": (
        "SET session_replication_role = replica; DELETE FROM plain WHERE id = (SELECT min(id) FROM plain)",
        "orphaned",
    ),
    "a chunk is there twice": (
        f"INSERT INTO {PLAIN('chunk')} (key_id, seq, start_offset, end_offset, content_hash, content)"
        f" SELECT key_id, seq, start_offset, end_offset, content_hash, content FROM {PLAIN('chunk')} LIMIT 1",
        "twice",
    ),
    "a change waits": (f"INSERT INTO {PAIR('inbox')} (key_tenant, key_name) VALUES ('{{1}}', '{{n}}')", "left"),
}  # fmt: skip


@pytest.fixture(scope="module")
def state(own_cluster: Cluster, run: Run) -> Iterator[psycopg.Connection]:
    """What the run has left, with some rows more, because its last statement may have emptied a source."""
    with stub_provider(DIMENSIONS) as stub, contextlib.closing(reconnect(own_cluster)) as connection:
        connection.execute("SELECT embedline.alter_model('stub', base_url => %s)", (stub.url,))
        for source in SOURCES:
            keys = "n" if len(source.keys) == 1 else "1, n::text"
            connection.execute(
                f"INSERT INTO {source.name} SELECT {keys}, 'more ' || n FROM generate_series(1950, 1960) AS n"
            )
        settle(connection)
        connection.autocommit = False
        yield connection
        connection.rollback()


def test_a_sound_state_has_no_findings(state: psycopg.Connection) -> None:
    found = check(state, DIMENSIONS)
    assert found.faults == 0, found.examples
    assert found.rows >= 33


@pytest.mark.parametrize(("damage", "kind"), DAMAGE.values(), ids=DAMAGE)
def test_the_check_finds_damage(state: psycopg.Connection, damage: str, kind: str) -> None:
    state.rollback()
    state.execute(damage.encode())
    found = check(state, DIMENSIONS)
    assert getattr(found, kind) > 0, found.examples
