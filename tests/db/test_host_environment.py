"""The threads of a model host: the same, whichever session starts it."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from small_models import static_model
from support import create_pipeline, scalar, wait_until
from working import work_until_idle

_NAMES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM")


@pytest.fixture
def model() -> Iterator[str]:
    """A model of its own, so that no other test uses its host."""
    folder = Path(tempfile.mkdtemp(prefix="embedline-alone-"))
    shutil.copytree(static_model(64), folder, dirs_exist_ok=True)
    folder.chmod(0o755)
    yield str(folder)
    shutil.rmtree(folder)


def host_of(model: str) -> int | None:
    """Return the process of the model's host, None if none runs."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes()
        except OSError:
            continue
        if b"embedline.model_host" in arguments and model.encode() in arguments:
            return int(path.parent.name)
    return None


def threads_of(pid: int) -> list[str | None]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    found = dict(pair.decode().partition("=")[::2] for pair in pairs)
    return [found.get(name) for name in _NAMES]


def test_a_host_that_a_worker_starts_has_the_threads_of_one_that_create_model_starts(
    database: psycopg.Connection, model: str
) -> None:
    scalar(database, "SELECT embedline.create_model('alone', 'sentence-transformers', %s)", (model,))
    first = host_of(model)
    assert first is not None
    expected = [str(len(os.sched_getaffinity(0))), "1", "true"]
    assert threads_of(first) == expected
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: host_of(model) is None, 20, "the host is gone")
    database.execute("CREATE TABLE page (id bigint PRIMARY KEY, body text)")
    database.execute("INSERT INTO page SELECT g, 'row ' || g FROM generate_series(1, 20) AS g")
    create_pipeline(database, content="body", model="alone", index_method="none")
    work_until_idle(database)
    second = host_of(model)
    assert second is not None
    assert second != first
    assert threads_of(second) == expected
    assert scalar(database, "SELECT count(embedding) FROM page_embedding") == 20
    os.kill(second, signal.SIGTERM)
