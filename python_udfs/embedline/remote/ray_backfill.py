"""A fleet of remote workers as actors of Ray, started again when they die."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedline.errors import NotReady
from embedline.remote.session import RemoteSession, connector
from embedline.remote.worker import Totals, Worker

if TYPE_CHECKING:
    from rich.progress import Progress

# Seconds between two questions how much still waits.
_LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Fleet:
    """The workers to run, and what each may use.

    `gpus` and `cpus` are those of one worker. `address` is that of a running cluster; None: one of this machine is started.
    """

    dsn: str
    pipeline: str
    version: int | None = None
    workers: int = 1
    gpus: float = 0.0
    cpus: float = 1.0
    requests: int | None = None
    address: str | None = None


class BackfillActor:
    """One remote worker in a process of Ray.

    The rows of a lost process are free, and the next run claims them.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def run(self) -> Totals:
        """Embed until nothing waits; return what was done since this process began."""
        fleet = self._fleet
        worker = Worker(fleet.dsn, fleet.pipeline, version=fleet.version, requests=fleet.requests)
        return worker.run(until_empty=True)


def backfill(fleet: Fleet, *, say: Callable[[str], None], progress: Progress | None = None) -> int:
    """Embed what waits; return how many rows wait when all actors are through.

    Raises NotReady without the extra "ray".
    """
    try:
        import ray
    except ImportError:
        raise NotReady("Ray is not installed", hint="pip install 'embedline[ray]'") from None
    watch = RemoteSession(connector(fleet.dsn), fleet.pipeline, fleet.version)
    with contextlib.closing(watch), _cluster(ray, fleet):
        total = watch.waiting()
        bar = progress.add_task(f"Embedding {fleet.pipeline}", total=total) if progress is not None else None
        actor: Any = ray.remote(BackfillActor).options(
            num_gpus=fleet.gpus, num_cpus=fleet.cpus, max_restarts=-1, max_task_retries=-1
        )
        actors: list[Any] = [actor.remote(fleet) for _ in range(fleet.workers)]
        runs = [one.run.remote() for one in actors]
        looked_at = 0.0
        while runs:
            done, runs = ray.wait(runs, timeout=_LOOK_SECONDS)
            for totals in ray.get(done):
                say(f"a worker is through: {totals}, in {totals.seconds:.1f} s")
            if time.monotonic() - looked_at >= _LOOK_SECONDS and progress is not None and bar is not None:
                looked_at = time.monotonic()
                left = watch.waiting()
                progress.update(bar, completed=max(total - left, 0), total=max(total, left))
        return watch.waiting()


@contextlib.contextmanager
def _cluster(ray: Any, fleet: Fleet) -> Any:
    """Join a cluster, or start one of this machine's, for the length of a block."""
    began = not ray.is_initialized()
    if began:
        ray.init(address=fleet.address, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        if began:
            ray.shutdown()
