"""Training a small model: gain, lineage, repetition, and its outcomes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from conftest import Connect, MakeRole
from embedline.client.build_index import PsycopgClient, build
from embedline.client.cli import app
from embedline.client.training.finetune import Finetuned, finetune
from embedline.client.training.pairs import is_held_out
from embedline.client.training.request import Request
from embedline.client.training.retrain import retrain
from embedline.client.training.run_folder import RunFolder, run_path
from embedline.core.query_hash import query_hash
from embedline.errors import (
    AlreadyExists,
    EmbedlineError,
    InvalidParameter,
    NotPermitted,
    NotReady,
    ProviderMisconfigured,
)
from fruit import REQUEST, create_fruit, place_to_train, silent
from support import MODELS, ROOT, drain, scalar, searching
from working import dsn_of

pytestmark = pytest.mark.torch


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the server sees."""
    with place_to_train() as made:
        yield made


@pytest.fixture
def request_(database: psycopg.Connection, folder: Path) -> Request:
    """A request on the fruit, which are there."""
    create_fruit(database)
    return replace(REQUEST, output=folder)


def _train(connection: psycopg.Connection, request: Request, **changes: Any) -> Finetuned:
    return finetune(connection, replace(request, **changes), silent)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def test_a_model_learns_serves_and_is_made_again_bit_for_bit(database: psycopg.Connection, request_: Request) -> None:
    done = _train(database, request_)
    assert done.outcome == "gain"
    assert done.metrics["recall@10"]["difference_interval"][0] > 0
    # Searched through the model host, in which numpy runs it.
    database.execute("SELECT embedline.add_embedding_version('fruit', 'fruit-1')")
    drain(database)
    build(PsycopgClient(database), "fruit", 2)
    database.execute("CREATE TABLE canary AS SELECT query, key FROM pair")
    trained = "SELECT query_hash FROM embedline.training_pair WHERE NOT is_held_out"
    database.execute(f"DELETE FROM canary WHERE embedline.query_hash(query) IN ({trained})".encode())
    rows = database.execute(
        "SELECT measure, verdict, low FROM embedline.evaluate('fruit', 2, 'canary', k => 10)"
    ).fetchall()
    verdicts = {measure: (verdict, low) for measure, verdict, low in rows}
    assert verdicts["nDCG@10"][0] == "pass"
    assert verdicts["nDCG@10"][1] > 0
    database.execute("SELECT embedline.cutover('fruit', 2, override_reason => 'the index is measured elsewhere')")
    serving = "SELECT model, trained_from, pairs_hash FROM embedline.versions WHERE serving"
    assert database.execute(serving).fetchall() == [("fruit-1", request_.base, done.pairs_hash)]
    query, key = database.execute("SELECT query, key FROM canary ORDER BY query LIMIT 1").fetchone() or ("", "")
    assert key in {row[0] for row in searching(database, "fruit", query, 10)}
    assert scalar(database, "SELECT embedline.rollback('fruit')") == 1
    # From the examples that are kept, and from the recorded pairs and today's rows.
    assert retrain(database, "fruit-1", None, "cpu", silent).is_same
    shutil.rmtree(f"{done.path}.training")
    assert retrain(database, "fruit-1", None, "cpu", silent).is_same
    database.execute("UPDATE fruit SET body = body || ' in a basket' WHERE id < '3'")
    drain(database)
    again = retrain(database, "fruit-1", None, "cpu", silent)
    assert not again.is_same
    assert again.differences == ["texts: the rows have changed since"]


def test_the_same_seed_gives_the_same_metrics_and_weights_and_another_does_not(
    database: psycopg.Connection, request_: Request
) -> None:
    first, second, third = (
        _train(database, request_, name=name, seed=seed) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    weights = dict(
        database.execute(
            "SELECT m.name, t.evidence ->> 'weights' FROM embedline.training AS t JOIN embedline.model AS m USING (model_id)"
        ).fetchall()
    )
    assert first.metrics == second.metrics
    assert weights["a"] == weights["b"] != weights["c"]
    assert first.metrics != third.metrics


def test_a_run_on_canaries_of_the_pipeline_is_refused(database: psycopg.Connection, request_: Request) -> None:
    database.execute("CREATE TABLE canary AS SELECT query, key FROM pair LIMIT 5")
    database.execute("SELECT embedline.set_canaries('fruit', 'canary')")
    with pytest.raises(InvalidParameter, match='5 queries in pair are canaries of pipeline "fruit"'):
        _train(database, request_)


def test_a_training_that_changes_nothing_is_inconclusive_and_told_so(
    database: psycopg.Connection, request_: Request
) -> None:
    options = ("--base", request_.base, "--pairs", "pair", "--name", "same", "--output", str(request_.output))
    environment = {"EMBEDLINE_DSN": dsn_of(database), "COLUMNS": "200"}
    command = ["finetune", "fruit", *options, "--epochs", "1", "--learning-rate", "1e-12"]
    done = CliRunner().invoke(app, [*command, "--json"], env=environment)
    assert done.exit_code == 2, done.output
    told = json.loads(done.stdout)
    assert told["outcome"] == "inconclusive"
    assert told["metrics"]["recall@10"]["difference"] == 0
    assert scalar(database, "SELECT outcome FROM embedline.training") == "inconclusive"
    assert "training…" in done.stderr
    again = CliRunner().invoke(app, ["retrain", "same"], env=environment)
    assert again.exit_code == 0, again.output
    assert "same: the same weights, bit for bit" in again.stdout
    # A refusal has the code of a training that did not take place.
    refused = CliRunner().invoke(app, command, env=environment)
    assert refused.exit_code == 3
    assert 'there is a model "same" already' in refused.stderr


def test_what_stands_against_a_training_is_told_before_it_begins(
    database: psycopg.Connection, request_: Request, connect: Connect, make_role: MakeRole
) -> None:
    database.execute(
        "SELECT embedline.create_model('prepared', 'sentence-transformers', %s)", (str(MODELS / "minilm"),)
    )
    faults: list[tuple[dict[str, Any], type[EmbedlineError], str]] = [
        ({"base": "nothing"}, EmbedlineError, 'there is no model "nothing"'),
        ({"base": "prepared"}, NotReady, "a graph prepared for onnxruntime, which cannot be trained"),
        ({"name": request_.base}, AlreadyExists, "there is a model"),
        ({"pipeline": "nothing"}, EmbedlineError, 'there is no pipeline "nothing"'),
        ({"held_out": 0.001}, NotReady, "queries to train on and 0 to measure by are too few"),
    ]
    for changes, kind, told in faults:
        with pytest.raises(kind, match=re.escape(told)) as caught:
            _train(database, request_, **changes)
        assert caught.value.hint
    if not _has_cuda():
        with pytest.raises(ProviderMisconfigured, match="this machine offers torch no CUDA device"):
            _train(database, request_, name="gpu", device="cuda")
    (request_.output or Path()).joinpath("taken").mkdir()
    with pytest.raises(AlreadyExists, match="taken exists already"):
        _train(database, request_, name="taken")
    with pytest.raises(InvalidParameter, match="is no name for a model"):
        replace(request_, name="../fruit")
    with pytest.raises(NotPermitted, match="only a superuser may fine-tune"):
        _train(connect(make_role("embedline_admin")), request_)
    database.execute("UPDATE pair SET key = 'gone ' || key")
    with pytest.raises(InvalidParameter, match="no key in pair is that of an embedded row"):
        _train(database, request_, restart=True)


def test_a_loss_is_told_and_not_registered(database: psycopg.Connection, request_: Request) -> None:
    assert _train(database, request_).outcome == "gain"
    # All that trains is mislabelled in the same way, and what measures is not.
    rows = database.execute("SELECT query, key FROM pair").fetchall()
    for query, key in rows:
        if not is_held_out(query_hash(query), request_.held_out, request_.seed):
            colour, fruit = ((int(part) + 1) % 10 for part in key.split("-"))
            database.execute("UPDATE pair SET key = %s WHERE query = %s", (f"{colour}-{fruit}", query))
    worse = replace(request_, base="fruit-1", name="worse")
    assert _train(database, worse).outcome == "loss"
    assert scalar(database, "SELECT count(*) FROM embedline.model WHERE name = 'worse'") == 0
    # The run is not repeated; what it found is told again.
    told: list[str] = []
    assert finetune(database, worse, lambda step, done, total: told.append(step)).outcome == "loss"
    assert "training" not in told


def test_two_runs_under_one_name_do_not_meet(database: psycopg.Connection, request_: Request) -> None:
    assert request_.output is not None
    with (
        RunFolder(run_path(request_.output / request_.name)).held(),
        pytest.raises(NotReady, match="another run is training in"),
    ):
        _train(database, request_)


def test_a_folder_that_the_server_does_not_see_is_told_before_it_begins(
    database: psycopg.Connection, request_: Request, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(NotReady, match=r"the server (cannot look into|sees no directory)"):
        _train(database, request_, output=tmp_path)


def test_without_torch_the_command_says_what_to_install() -> None:
    # The system's own Python, in which no torch is installed.
    code = "from embedline.client.training.request import require_libraries as r; r()"
    done = subprocess.run(
        ["/usr/bin/python3", "-c", code], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT / "python_udfs"), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert "fine-tuning needs torch, sentence_transformers" in done.stderr
