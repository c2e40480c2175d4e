"""kill -9 of a worker's backend and of the whole server at every phase boundary of an upgrade: run again, it ends the same."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import psycopg
import pytest

from embedline.client.build_index import PsycopgClient, build
from embedline.dev.cluster.server import Cluster
from embedline.pipelines.ddl.plan import TABLES
from fault_table import note
from generated_names import PAGE
from killing import kill_backend, reconnect
from stub_provider import StubProvider, stub_provider, vector_of
from support import assert_exact, create_pages, create_pipeline, data_count, scalar, settle, wait_until
from upgrading import OVERRIDE, add_version, cut_over, settle_versions, versions
from working import Worker, create_stub_model, remove_all

ROWS = 1000
INDEX = PAGE.index(2)
# What the chain does is looked for in the catalogue first, as Alembic's operations do.
PHASES = ("expand", "fill", "index", "gate", "cutover", "rollback", "cutover again", "contract")
# (schema.table or view) that an upgrade leaves behind, and none besides.
LEFT = {"page_v2", "page_v2_exact", "page_chunk", *(f"page_{suffix}" for suffix in TABLES)}


@pytest.fixture(scope="module")
def providers() -> Iterator[dict[str, StubProvider]]:
    """The providers of the old model and the new one: a model host would have to start anew with each server."""
    with stub_provider(64) as old, stub_provider(32) as new:
        yield {"old": old, "new": new}


@pytest.fixture
def page(own_cluster: Cluster, providers: dict[str, StubProvider]) -> Iterator[psycopg.Connection]:
    """A pipeline on a server of its own, filled by the old model; the new one is registered."""
    with contextlib.closing(reconnect(own_cluster)) as connection:
        remove_all(connection)
        for name, provider in providers.items():
            create_stub_model(connection, provider, name)
        create_pages(connection, ROWS)
        create_pipeline(connection, model="old")
        settle(connection, 60)
        build(PsycopgClient(connection), "page")
        yield connection


def _vectors(texts: Sequence[str], dimensions: int) -> npt.NDArray[np.float32]:
    return np.stack([vector_of(text, dimensions) for text in texts])


OLD, NEW = functools.partial(_vectors, dimensions=64), functools.partial(_vectors, dimensions=32)


def _run_chain(connection: psycopg.Connection, last: str = "contract") -> None:
    """Run the phases from the first to `last`, each of which does what is not done yet."""
    for phase in PHASES:
        _run_phase(connection, phase)
        if phase == last:
            break


def _run_phase(connection: psycopg.Connection, phase: str) -> None:
    if 1 not in versions(connection, "serving"):
        return
    kinds = [row[0] for row in connection.execute("SELECT kind FROM embedline.cutover ORDER BY cutover_id")]
    if phase == "expand" and 2 not in versions(connection, "state"):
        add_version(connection, "new")
    elif phase == "fill":
        settle_versions(connection, 60)
    elif phase == "index":
        build(PsycopgClient(connection), "page", 2)
    elif phase == "gate" and versions(connection, "gate")[2] is None:
        connection.execute("SELECT embedline.evaluate('page', 2, query_count => 20)")
    elif phase == "cutover" and not kinds:
        cut_over(connection, 2)
    elif phase == "rollback" and kinds == ["cutover"]:
        connection.execute("SELECT embedline.rollback('page')")
    elif phase == "cutover again" and kinds == ["cutover", "rollback"]:
        cut_over(connection, 2)
    elif phase == "contract":
        connection.execute("SELECT embedline.drop_embedding_version('page', 1, rollback_window => '0')")


def _assert_ended(connection: psycopg.Connection) -> None:
    """Assert that the upgrade has ended as one without a kill does, counted."""
    settle(connection, 60)
    assert versions(connection, "serving") == {2: True}
    assert versions(connection, "missing") == {2: 0}
    assert versions(connection, "index_state") == {2: "valid"}
    assert assert_exact(connection, embed=NEW) == ROWS == data_count(connection, "v2")
    assert data_count(connection, "chunk") == ROWS == scalar(connection, "SELECT count(*) FROM page_embedding")
    tables = "SELECT relname FROM pg_class WHERE relnamespace = 'embedline_data'::regnamespace AND relkind = 'r'"
    assert {row[0] for row in connection.execute(tables)} == LEFT
    views = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'v' ORDER BY 1"
    assert [row[0] for row in connection.execute(views)] == ["page_embedding", "page_embedding_v2"]
    assert scalar(connection, "SELECT count(*) FROM pg_index WHERE NOT indisvalid") == 0
    for table in ("version_queue", "version_dead_letter", "dead_letter"):
        assert scalar(connection, f"SELECT count(*) FROM embedline.{table}") == 0
    kinds = connection.execute("SELECT kind FROM embedline.cutover ORDER BY cutover_id").fetchall()
    assert kinds == [("cutover",), ("rollback",), ("cutover",)]
    models = {row[0] for row in connection.execute("SELECT name FROM embedline.model WHERE provider = 'openai'")}
    assert models == {"new"}, "the old model is forgotten"
    note(ROWS)


def _kill_server(cluster: Cluster, connection: psycopg.Connection) -> None:
    cluster.kill()
    connection.close()
    cluster.start()


def _stop_at_once(cluster: Cluster, connection: psycopg.Connection) -> None:
    cluster.stop("immediate")
    connection.close()
    cluster.start()


def _kill_backend(cluster: Cluster, connection: psycopg.Connection) -> None:
    """Kill a session: the postmaster ends all others, and recovers."""
    with contextlib.closing(psycopg.connect(cluster.dsn(), autocommit=True)) as other:
        kill_backend(connection.info.backend_pid, other)
    connection.close()


KILLS: dict[str, Callable[[Cluster, psycopg.Connection], None]] = {"backend": _kill_backend, "server": _kill_server}


# To the server an immediate stop is the same within a phase.
AFTER_A_PHASE = KILLS | {"immediate stop": _stop_at_once}


@pytest.mark.parametrize("kill", AFTER_A_PHASE)
def test_an_upgrade_killed_after_each_phase_is_run_again_from_its_start(
    own_cluster: Cluster, page: psycopg.Connection, kill: str
) -> None:
    """Each phase is committed, and then its client is told nothing more."""
    connection = page
    for phase in PHASES:
        _run_chain(connection, phase)
        connection.execute("UPDATE page SET body = body || ' ' || %s WHERE id <= 20", (phase,))
        AFTER_A_PHASE[kill](own_cluster, connection)
        connection = reconnect(own_cluster)
    with connection:
        _run_chain(connection)
        _assert_ended(connection)


@pytest.mark.parametrize("kill", KILLS)
def test_a_kill_while_a_version_is_filled(own_cluster: Cluster, page: psycopg.Connection, kill: str) -> None:
    add_version(page, "new", backfill_rate=150)
    with Worker(own_cluster.dsn()) as worker:
        wait_until(lambda: data_count(page, "v2") > 100, 30, "the fill is under way")
        page.execute("DELETE FROM page WHERE id > %s", (ROWS - 10,))
        if kill == "backend":
            kill_backend(worker.pid, page)
        else:
            _kill_server(own_cluster, page)
        worker.join(30)
    with reconnect(own_cluster) as after:
        filled = data_count(after, "v2")
        assert filled < ROWS
        after.execute(
            "INSERT INTO page (id, title, body) SELECT n, 'again', 'row ' || n FROM generate_series(%s::integer, %s) AS n",
            (ROWS - 9, ROWS),
        )
        after.execute("SELECT embedline.configure_backfill('page', 2)")
        _run_chain(after)
        _assert_ended(after)


@pytest.mark.parametrize("kill", KILLS)
def test_a_kill_while_the_index_is_built(own_cluster: Cluster, page: psycopg.Connection, kill: str) -> None:
    _run_chain(page, "fill")
    with contextlib.ExitStack() as stack:
        builder, holder = (stack.enter_context(contextlib.closing(reconnect(own_cluster))) for _ in range(2))
        # CONCURRENTLY waits for those who may write to the table, after it has entered the index as invalid.
        holder.execute("BEGIN")
        holder.execute(f"LOCK TABLE {PAGE.version(2)} IN ROW EXCLUSIVE MODE")
        thread = _in_thread(lambda: build(PsycopgClient(builder), "page", 2))
        wait_until(lambda: _index_is_valid(page) is False, 30, "the index is half built")
        KILLS[kill](own_cluster, builder)
        thread.join(30)
    with reconnect(own_cluster) as after:
        assert _index_is_valid(after) is False, "an INVALID index is left over"
        _run_chain(after)
        _assert_ended(after)


# What was not committed a kill of the server undoes as that of a backend does: one of each will do.
@pytest.mark.parametrize(
    ("change", "kill"), [("expand", "backend"), ("cutover", "server"), ("rollback", "backend"), ("contract", "backend")]
)
def test_a_kill_within_a_change_of_the_versions_undoes_it_as_a_whole(
    own_cluster: Cluster, page: psycopg.Connection, change: str, kill: str
) -> None:
    before = {"expand": "", "cutover": "gate", "rollback": "cutover", "contract": "cutover again"}[change]
    if before:
        _run_chain(page, before)
    serving = versions(page, "serving")
    statement = {
        "expand": "SELECT embedline.add_embedding_version('page', 'new')",
        "cutover": OVERRIDE.replace("%s, %s", "'page', 2"),
        "rollback": "SELECT embedline.rollback('page')",
        "contract": "SELECT embedline.drop_embedding_version('page', 1, rollback_window => '0')",
    }[change]
    other = reconnect(own_cluster)
    other.execute("BEGIN")
    # Done, and not committed.
    other.execute(statement.encode())
    KILLS[kill](own_cluster, other)
    with reconnect(own_cluster) as after:
        assert versions(after, "serving") == serving
        after.execute("UPDATE page SET body = body || ' after the crash' WHERE id <= 20")
        settle(after)
        assert assert_exact(after, embed=OLD if serving[1] else NEW) == ROWS
        _run_chain(after)
        _assert_ended(after)


def _in_thread(work: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        with contextlib.suppress(psycopg.Error):
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _index_is_valid(connection: psycopg.Connection) -> bool | None:
    query = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)"
    row = connection.execute(query, (INDEX,)).fetchone()
    return None if row is None else bool(row[0])
