"""A killed training, or one on a full disk, goes on from a whole checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from embedline.client.training.finetune import finetune
from embedline.errors import InsufficientDisk, InvalidParameter
from fault_table import note
from fruit import REQUEST, create_fruit, place_to_train, silent
from support import ROOT, scalar
from working import dsn_of

pytestmark = pytest.mark.torch
# Trains until a step and kills itself there.
_KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from embedline.client.connection import connect
from embedline.client.training.finetune import finetune
from fruit import REQUEST
dsn, folder, step = sys.argv[1:]
def report(name, done, total):
    if name == "training" and done == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
finetune(connect(dsn), replace(REQUEST, name="killed", output=Path(folder)), report)
"""
_WEIGHTS = """
    SELECT m.name, t.evidence ->> 'weights' FROM embedline.training AS t JOIN embedline.model AS m USING (model_id)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the server sees."""
    with place_to_train() as made:
        yield made


def test_a_killed_training_goes_on_and_ends_with_the_weights_of_one_that_was_not(
    database: psycopg.Connection, folder: Path
) -> None:
    create_fruit(database)
    request = replace(REQUEST, name="whole", output=folder)
    whole = finetune(database, request, silent)
    arguments = (dsn_of(database), str(folder), "13")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'python_udfs'}:{ROOT / 'tests'}"}
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert scalar(database, "SELECT count(*) FROM embedline.training") == 1
    checkpoints = folder / "killed.training" / "checkpoints"
    newest = max(checkpoints.iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    # The kill may come while a checkpoint is written.
    (newest / "trainer_state.json").write_text('{"global_step": ')
    with pytest.raises(InvalidParameter, match=r"an unfinished run in .* had other epochs"):
        finetune(database, replace(request, name="killed", epochs=3), silent)
    resumed = finetune(database, replace(request, name="killed"), silent)
    assert resumed.resumed_from is not None
    assert 0 < resumed.resumed_from < int(newest.name.rpartition("-")[2])
    weights = dict(database.execute(_WEIGHTS).fetchall())
    assert weights["killed"] == weights["whole"]
    assert resumed.metrics == whole.metrics
    assert [path.name for path in (folder / "killed.training").iterdir()] == ["examples.jsonl.gz"]
    note(1)


def test_a_full_disk_ends_a_training_with_a_sentence(database: psycopg.Connection, folder: Path) -> None:
    create_fruit(database)
    small = folder / "small"
    small.mkdir(mode=0o755)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0755", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        filler = small / "filler"
        # Known ahead: there is no room for the checkpoints.
        filler.write_bytes(b"\0" * 3_900_000)
        with pytest.raises(InsufficientDisk, match="MB free, and checkpoints take"):
            finetune(database, replace(REQUEST, output=small), silent)

        # Met on the way.
        filler.unlink()

        def fill(step: str, done: int, total: int) -> None:
            if step == "training" and done == 1:
                with contextlib.suppress(OSError):
                    filler.write_bytes(b"\0" * 4_194_304)

        with pytest.raises(InsufficientDisk, match=r"the disk of .* is full") as caught:
            finetune(database, replace(REQUEST, output=small), fill)
        assert "run the same command again" in (caught.value.hint or "")
        filler.unlink()
        assert finetune(database, replace(REQUEST, output=small), silent).outcome == "gain"
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
    note(1)
