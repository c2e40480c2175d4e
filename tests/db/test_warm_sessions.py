"""Sessions of the run's server share imports and tokenizers, and nothing else."""

from __future__ import annotations

import psycopg
import pytest

from conftest import Connect
from support import scalar

_SESSION = """
    CREATE FUNCTION test_session() RETURNS text[] LANGUAGE plpython3u AS $python$
        import random, sys, threading
        imported = "embedline.worker.embed_pending" in sys.modules and "openai" in sys.modules
        return [str(imported), str(len(GD)), str(threading.active_count()), str(random.random())]
    $python$
"""


def test_a_new_session_has_its_imports_made_and_random_numbers_of_its_own(
    database: psycopg.Connection, connect: Connect
) -> None:
    if "warm" not in scalar(database, "SHOW shared_preload_libraries"):
        pytest.skip("this machine cannot build the library, or coverage is measured")
    database.execute(_SESSION)
    imported, *others = zip(*(scalar(connect(), "SELECT test_session()") for _ in range(3)), strict=True)
    assert imported == ("True",) * 3
    assert others[:2] == [("0",) * 3, ("1",) * 3]
    assert len(set(others[2])) == 3
