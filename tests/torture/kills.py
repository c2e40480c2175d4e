"""The kills of the torture: drawn from its seed, one after the other, for as long as it lasts."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import psycopg

from embedline.dev.cluster.server import Cluster
from killing import kill_backend, model_host_pids, reconnect
from torture.sessions import Client, Worker

# Kinds with their weights, and how many of the workers each ends; all of them where the server restarts.
KINDS = {
    "terminate a worker": 4,
    "terminate a client": 3,
    "cancel a worker": 1,
    "kill -9 of a worker's backend": 2,
    "kill -9 of the model host": 3,
    "immediate stop and start": 2,
    "kill -9 of the server": 1,
}
_OF_ONE_WORKER = ("terminate a worker", "cancel a worker")
_OF_ALL_WORKERS = ("kill -9 of a worker's backend", "immediate stop and start", "kill -9 of the server")
# Seconds between two kills.
_PAUSES = (0.5, 5.0)


def schedule(seed: int) -> Iterator[tuple[float, str, random.Random]]:
    """Yield the seconds until the next kill, its kind, and what chooses the victim."""
    rng = random.Random(f"{seed} kills")
    while True:
        yield rng.uniform(*_PAUSES), rng.choices(list(KINDS), list(KINDS.values()))[0], rng


def workers_killed(counts: Counter[str], workers: int) -> int:
    """Return how many workers the kills have ended, those of the server with each worker it had."""
    return sum(counts[kind] for kind in _OF_ONE_WORKER) + workers * sum(counts[kind] for kind in _OF_ALL_WORKERS)


class Killer(threading.Thread):
    """Kills by schedule until `ended` is set; `counts` tells what was done."""

    def __init__(
        self, cluster: Cluster, seed: int, ended: threading.Event, clients: Sequence[Client], workers: Sequence[Worker]
    ) -> None:
        super().__init__(daemon=True)
        self.counts = Counter[str]()
        self.error: BaseException | None = None
        self._cluster = cluster
        self._seed = seed
        self._ended = ended
        self._clients = clients
        self._workers = workers

    def run(self) -> None:
        try:
            for pause, kind, rng in schedule(self._seed):
                if self._ended.wait(pause):
                    return
                if self._kill(kind, rng):
                    self.counts[kind] += 1
        except BaseException as error:
            self.error = error

    def _kill(self, kind: str, rng: random.Random) -> bool:
        if kind == "immediate stop and start":
            self._cluster.stop("immediate")
            self._cluster.start()
            return True
        if kind == "kill -9 of the server":
            self._cluster.kill()
            self._cluster.start()
            return True
        if kind == "kill -9 of the model host":
            hosts = model_host_pids(self._cluster)
            for pid in hosts:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return bool(hosts)
        pid = rng.choice(self._clients if kind == "terminate a client" else self._workers).pid
        with contextlib.closing(reconnect(self._cluster)) as bystander:
            if pid is None or not _is_backend(bystander, pid):
                return False
            if kind == "kill -9 of a worker's backend":
                kill_backend(pid, bystander)
            else:
                function = "pg_cancel_backend" if kind.startswith("cancel") else "pg_terminate_backend"
                bystander.execute(f"SELECT {function}(%s)", (pid,))
        return True


def _is_backend(connection: psycopg.Connection, pid: int) -> bool:
    return connection.execute("SELECT FROM pg_stat_activity WHERE pid = %s", (pid,)).fetchone() is not None
