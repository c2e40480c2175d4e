"""Remote workers in the tasks of Dask, as the documentation shows it."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from embedline.remote import Worker
from stub_provider import StubProvider
from support import ROOT
from working import assert_all_settled, insert_rows

pytestmark = pytest.mark.faults

_PAGE = Path(ROOT) / "docs" / "how-to" / "embed-outside-the-database.md"


def test_the_example_of_dask_embeds_all_once(page: psycopg.Connection, remote_dsn: str, stub: StubProvider) -> None:
    distributed = pytest.importorskip("distributed")
    # Two workers would both have rows of a block that the backfill has not read yet.
    Worker(remote_dsn, "page").run(until_empty=True)
    insert_rows(page, 26, 225)
    stub.behave(latency=0.05, remember=True)
    found = re.search(r"^```python\n# Dask\n(.*?)^```", _PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        example = found[1].replace("scheduler:8786", cluster.scheduler_address).replace(", version=2", "")
        example = example.replace("postgresql://gpu@db1/app", remote_dsn).replace('"article"', '"page"')
        names: dict[str, object] = {}
        exec(example, names)
    assert names["rows"] == 200
    assert assert_all_settled(page, stub.dimensions) == 225
    assert set(stub.texts_seen().values()) == {1}
