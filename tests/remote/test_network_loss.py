"""A remote worker whose network is lost: its rows are embedded by another one, once, and it comes back by itself."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from conftest import StartCluster
from embedline.remote import Worker
from networks import LOSSY, own_network
from stub_provider import stub_provider
from support import scalar, wait_until
from working import assert_all_settled, create_stub_model, create_stub_pipeline, insert_rows

pytestmark = pytest.mark.faults

ROWS, REQUEST, IN_FLIGHT, DIMENSIONS = 400, 10, 4, 8


def test_rows_of_a_lost_network_are_embedded_by_another_worker(start_cluster: StartCluster, tmp_path: Path) -> None:
    with own_network() as network, stub_provider(DIMENSIONS) as stub:
        cluster = start_cluster(settings_={"listen_addresses": f"127.0.0.1, {LOSSY}"})
        with psycopg.connect(cluster.dsn(), autocommit=True) as page:
            with (cluster.data_dir / "pg_hba.conf").open("a") as rules:
                rules.write(f"host all all {LOSSY}/32 scram-sha-256\n")
            page.execute("SELECT pg_reload_conf()")
            create_stub_model(page, stub, max_batch_items=REQUEST, concurrency=IN_FLIGHT)
            create_stub_pipeline(page)
            page.execute("CREATE ROLE lossy LOGIN PASSWORD 'lossy' IN ROLE embedline_remote")
            page.execute("SELECT embedline.grant_remote('page', 'lossy', true)")
            insert_rows(page, 1, ROWS)
            stub.behave(latency=1.0, remember=True)
            dsn = conninfo.make_conninfo(cluster.dsn(), user="lossy", password="lossy")
            command = [
                *(str(Path(sys.executable).with_name("embedline")), "remote-worker", "page"),
                *("--dsn", conninfo.make_conninfo(dsn, host=LOSSY)),
            ]
            told = tmp_path / "told"
            with told.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as lost:
                wait_until(lambda: stub.in_flight() >= IN_FLIGHT * REQUEST, 60, "its requests are in flight")
                network.lose()
                other = Worker(dsn, "page")
                thread = threading.Thread(target=other.run, daemon=True)
                thread.start()
                wait_until(lambda: scalar(page, "SELECT pending = 0 FROM embedline.status"), 120, "nothing waits")
                wait_until(lambda: "connection is lost" in told.read_text(), 60, "it has noticed")
                network.restore()
                wait_until(lambda: scalar(page, "SELECT count(*) FROM embedline.worker") == 2, 60, "it is back")
                lost.send_signal(signal.SIGTERM)
                assert lost.wait(60) == 0, told.read_text()
            other.stop()
            thread.join(60)
            assert assert_all_settled(page, DIMENSIONS) == ROWS
            in_vain = sum(stub.texts_seen().values()) - ROWS
            # What was in flight, and as many texts that were fetched and waited for their turn.
            assert 0 < in_vain <= 2 * IN_FLIGHT * REQUEST
            assert scalar(page, "SELECT count(*) FROM embedline.dead_letter") == 0
