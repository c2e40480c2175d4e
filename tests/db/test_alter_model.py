"""A model whose endpoint moves: its vectors stay if the new endpoint gives them again, and nothing changes if it does not."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from dialects import Body, Dialect, serving
from generated_names import PAGE
from stub_provider import vector_of
from support import MODELS, create_pipeline, data_count, scalar, settle, wait_until
from working import assert_all_settled, dsn_of, remove_all, working

ROWS = 40
DIMENSIONS = 64


@pytest.fixture
def endpoints() -> Iterator[tuple[Dialect, Dialect]]:
    """Two endpoints of the same model."""
    with serving(Dialect(DIMENSIONS)) as first, serving(Dialect(DIMENSIONS)) as second:
        yield first, second


@pytest.fixture
def db(module_database: psycopg.Connection, endpoints: tuple[Dialect, Dialect]) -> Iterator[psycopg.Connection]:
    """A database with model "stub" at the first endpoint; pipelines and models are gone after each test."""
    module_database.execute(
        "SELECT embedline.create_model('stub', 'openai', 'stub', base_url => %s)", (endpoints[0].url,)
    )
    endpoints[0].forget()
    yield module_database
    remove_all(module_database)


def create_pages(db: psycopg.Connection, count: int = ROWS, **options: Any) -> None:
    db.execute("CREATE TABLE page (id bigint PRIMARY KEY, body text)")
    add_pages(db, 1, count)
    create_pipeline(db, "page", "page", "body", "stub", index_method="none", **options)


def add_pages(db: psycopg.Connection, first: int, last: int) -> None:
    numbers = "generate_series(%s::integer, %s) AS n"
    db.execute(f"INSERT INTO page SELECT n, 'row ' || n || ' about something' FROM {numbers}", (first, last))


def alter(db: psycopg.Connection, **given: Any) -> list[str]:
    """Call alter_model for the stub; return the notices."""
    notices: list[str] = []

    def note(diagnostic: psycopg.errors.Diagnostic) -> None:
        notices.append(str(diagnostic.message_primary))

    named = "".join(f", {name} => %s" for name in given)
    db.add_notice_handler(note)
    try:
        db.execute(f"SELECT embedline.alter_model('stub'{named})", tuple(given.values()))
    finally:
        db.remove_notice_handler(note)
    return notices


def stored(db: psycopg.Connection) -> dict[str, Any]:
    """Return the model's row, and the fingerprints of its versions."""
    row = dict(scalar(db, "SELECT to_jsonb(m) FROM embedline.model AS m WHERE name = 'stub'"))
    row["versions"] = scalar(db, "SELECT array_agg(fingerprint ORDER BY number) FROM embedline.version")
    return row


@contextlib.contextmanager
def unchanged(db: psycopg.Connection, error: type[Exception], match: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Assert that the block fails and leaves the model as it was."""
    before = stored(db)
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert stored(db) == before


def test_an_endpoint_that_gives_the_stored_vectors_again_takes_over_for_a_sample(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect]
) -> None:
    first, second = endpoints
    create_pages(db)
    settle(db)
    before = stored(db)
    first.forget()
    (notice,) = alter(db, base_url=second.url)
    assert "stored chunks came back the same: lowest cosine 1.0000" in notice
    after = stored(db)
    assert (after["fingerprint"], after["versions"]) == (before["fingerprint"], before["versions"])
    assert after["base_url"] == second.url
    assert first.paid == []
    sampled = len(second.paid)
    assert 1 < sampled <= ROWS + 1
    settle(db)
    assert len(second.paid) == sampled, "nothing is paid for again"
    add_pages(db, 100, 104)
    settle(db)
    assert first.paid == []
    assert len(second.paid) == sampled + 5
    assert assert_all_settled(db, DIMENSIONS) == ROWS + 5
    db.execute("SELECT embedline.embed_query('page', 'a query')")
    assert second.paid[-1] == "a query"


def test_verify_and_versions_to_come_take_the_moved_model_for_what_it_was(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect]
) -> None:
    create_pages(db)
    settle(db)
    alter(db, base_url=endpoints[1].url)
    assert stored(db)["probed_fingerprint"] is not None
    assert db.execute("SELECT * FROM embedline.verify('page', sample => 20)").fetchall() == []
    endpoints[1].forget()
    db.execute("SELECT embedline.add_embedding_version('page', 'stub', column_type => 'halfvec')")
    settle(db)
    assert data_count(db, "v2") == ROWS
    assert endpoints[1].paid == [], "the version before lends"
    alter(db, base_url=endpoints[0].url)
    assert stored(db)["probed_fingerprint"] is None


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3, 0.05])
def test_noise_of_floats_is_the_same_model(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect], noise: float
) -> None:
    random = np.random.default_rng(1)

    def embed(text: str, _: Body) -> Any:
        vector = vector_of(text, DIMENSIONS)
        return vector * 3 + random.standard_normal(DIMENSIONS).astype(np.float32) * noise

    create_pages(db)
    settle(db)
    endpoints[1].embed = embed
    alter(db, base_url=endpoints[1].url)
    assert stored(db)["base_url"] == endpoints[1].url


@pytest.mark.parametrize("kind", ["another model", "a server in int8", "one text in five", "negated"])
def test_another_model_is_refused_with_the_figures_and_the_other_way(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect], kind: str
) -> None:
    random = np.random.default_rng(1)

    def embed(text: str, _: Body) -> Any:
        vector = vector_of(text, DIMENSIONS)
        if kind == "another model":
            return vector_of(f"other {text}", DIMENSIONS)
        if kind == "a server in int8":
            # A cosine of about 0.98, as that of MiniLM in int8 to itself in float32.
            return vector + random.standard_normal(DIMENSIONS).astype(np.float32) * 0.2
        if kind == "negated":
            return -vector
        return vector_of(f"other {text}", DIMENSIONS) if "5 about" in text or "0 about" in text else vector

    create_pages(db)
    settle(db)
    endpoints[1].embed = embed
    with unchanged(db, psycopg.errors.InvalidParameterValue, "other vectors than those stored") as refused:
        alter(db, base_url=endpoints[1].url)
    diagnostic = refused.value.diag  # type: ignore[attr-defined]
    assert "stored chunks came back otherwise: lowest cosine " in diagnostic.message_detail
    assert "where 0.99 is needed" in diagnostic.message_detail
    assert "add_embedding_version('page', 'stub_2')" in diagnostic.message_hint
    endpoints[0].forget()
    add_pages(db, 100, 104)
    settle(db)
    assert len(endpoints[0].paid) == 5, "the endpoint before goes on"


def test_vectors_that_are_not_normalised_are_compared_by_length_too(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect]
) -> None:
    create_pages(db, distance="l2")
    settle(db)
    endpoints[1].embed = lambda text, _: vector_of(text, DIMENSIONS) * 2
    with unchanged(db, psycopg.errors.InvalidParameterValue, "other vectors"):
        alter(db, base_url=endpoints[1].url)
    endpoints[1].embed = None
    alter(db, base_url=endpoints[1].url)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("away", psycopg.Error, "connection to"),
        ("refuses", psycopg.Error, "status 401"),
        ("of another width", psycopg.Error, "returns vectors of another dimension"),
        ("fails at the sample", psycopg.Error, "status 500"),
        ("no address", psycopg.errors.InvalidParameterValue, "must begin with"),
        ("a secret", psycopg.errors.InvalidParameterValue, "must not hold"),
    ],
)
def test_nothing_is_changed_if_the_endpoint_will_not_do(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect], kind: str, error: type[Exception], words: str
) -> None:
    create_pages(db)
    settle(db)
    second = endpoints[1]
    url = {"away": "http://127.0.0.1:1/v1", "no address": "ftp://x", "a secret": f"{second.url}?api_key=1"}.get(
        kind, second.url
    )
    if kind == "refuses":
        second.refuse = lambda _: (401, {"error": "no such key"})
    if kind == "of another width":
        second.dimensions = 8
    if kind == "fails at the sample":
        second.refuse = lambda body: (500, {}) if len(body["input"]) > 1 else None
    with unchanged(db, error, words):
        alter(db, base_url=url, concurrency=3, options='{"max_tokens": 5}')


def test_without_stored_vectors_the_endpoint_is_only_probed_and_gives_the_fingerprint(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect]
) -> None:
    create_pages(db)
    db.execute("SELECT embedline.publication('page')")
    before = stored(db)
    endpoints[1].embed = lambda text, _: vector_of(f"other {text}", DIMENSIONS)
    (notice,) = alter(db, base_url=endpoints[1].url)
    assert "only probed" in notice
    assert endpoints[1].paid == ["probe"]
    after = stored(db)
    # Nothing that is stored rests on it, and the model at the address before is another.
    assert after["fingerprint"] != before["fingerprint"]
    assert after["versions"] != before["versions"]
    assert after["probed_fingerprint"] is None
    published = f"SELECT model_fingerprint, fingerprint FROM {PAGE('routing')}"
    assert db.execute(published).fetchall() == [(after["fingerprint"], after["versions"][0])]
    settle(db)
    assert endpoints[0].paid == []
    assert data_count(db, "v1") == ROWS


def test_limits_prices_and_timeouts_change_without_asking_the_endpoint(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect]
) -> None:
    create_pages(db)
    settle(db)
    before = stored(db)
    endpoints[0].forget()
    changes = {
        "concurrency": 2, "max_batch_items": 7, "max_batch_tokens": 1000, "timeout_seconds": 9.0,
        "price_per_million_tokens": Decimal("0.5"),
    }  # fmt: skip
    alter(db, **changes)
    assert endpoints[0].requests == []
    assert stored(db) == before | changes | {"price_per_million_tokens": 0.5}
    add_pages(db, 100, 120)
    settle(db)
    assert max(len(body["input"]) for body in endpoints[0].requests) == 7
    assert alter(db, **changes) == ['model "stub" is like that already: nothing has changed']


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"concurrency": 0}, "concurrency must be between"),
        ({"max_batch_items": -1}, "max_batch_items must be between"),
        ({"timeout_seconds": 0.0}, "timeout_seconds must be above 0"),
        ({"price_per_million_tokens": -1}, "price_per_million_tokens must be"),
        ({"api_key_env": "sk-secret"}, "api_key_env must be the name"),
        ({"options": '{"max_token": 5}'}, 'unknown option "max_token"'),
        ({"options": '{"document_body": {"input_type": "x"}}'}, '"document_body" of model "stub" decides its vectors'),
        ({"options": '{"send_dimensions": true}'}, "decides its vectors"),
        ({"model": ""}, "model must not be empty"),
    ],
)
def test_what_cannot_be_altered_is_refused(db: psycopg.Connection, given: dict[str, Any], words: str) -> None:
    with unchanged(db, psycopg.errors.InvalidParameterValue, words):
        alter(db, **given)


def test_options_are_merged_and_null_takes_one_away(db: psycopg.Connection, endpoints: tuple[Dialect, Dialect]) -> None:
    create_pages(db)
    settle(db)
    alter(db, options='{"encoding_format": "float", "max_tokens": 100}')
    assert stored(db)["options"] == {"encoding_format": "float", "max_tokens": 100}
    assert stored(db)["max_tokens"] == 100
    endpoints[0].forget()
    alter(db, options='{"encoding_format": null}')
    assert stored(db)["options"] == {"max_tokens": 100}
    assert {body["encoding_format"] for body in endpoints[0].requests} == {"base64"}


def test_an_empty_text_takes_the_keys_variable_away(db: psycopg.Connection) -> None:
    alter(db, api_key_env="SOME_KEY")
    assert stored(db)["api_key_env"] == "SOME_KEY"
    alter(db, api_key_env="")
    assert stored(db)["api_key_env"] is None


def test_the_models_name_may_change_with_the_endpoint(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect]
) -> None:
    create_pages(db)
    settle(db)
    fingerprint = stored(db)["fingerprint"]
    alter(db, base_url=endpoints[1].url, model="org/stub-v1")
    assert {body["model"] for body in endpoints[1].requests} == {"org/stub-v1"}
    assert stored(db)["fingerprint"] == fingerprint


def test_what_was_learned_of_the_endpoint_before_is_forgotten(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect]
) -> None:
    create_pages(db)
    endpoints[0].refuse = lambda body: (400, {"error": "base64"}) if body["encoding_format"] == "base64" else None
    settle(db)
    assert stored(db)["learned"] == {"encoding_format": "float"}
    alter(db, base_url=endpoints[1].url)
    assert stored(db)["learned"] == {}
    add_pages(db, 100, 104)
    settle(db)
    assert {body["encoding_format"] for body in endpoints[1].requests} == {"base64"}


def test_an_open_circuit_is_closed_by_an_endpoint_that_answers(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect]
) -> None:
    create_pages(db)
    endpoints[0].refuse = lambda _: (401, {"error": "gone"})
    db.execute("SELECT embed_pending(100)")
    assert "401" in scalar(db, "SELECT last_error FROM embedline.status")
    alter(db, base_url=endpoints[1].url)
    settle(db)
    assert assert_all_settled(db, DIMENSIONS) == ROWS


def test_requests_in_flight_are_still_written_when_the_endpoint_moves(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect]
) -> None:
    first, second = endpoints
    create_pages(db)
    settle(db)
    gate = threading.Event()

    def embed(text: str, _: Body) -> Any:
        if "row 2" in text:
            gate.wait(20)
        return vector_of(text, DIMENSIONS)

    first.embed = embed
    first.forget()
    second.forget()
    with working(db):
        add_pages(db, 200, 203)
        wait_until(lambda: first.requests, what="a request is in flight")
        alter(db, base_url=second.url)
        sampled = len(second.paid)
        add_pages(db, 300, 303)
        wait_until(lambda: len(second.paid) == sampled + 4, what="the new endpoint is used")
        gate.set()
        wait_until(lambda: data_count(db, "v1") == ROWS + 8, what="all are written")
    assert assert_all_settled(db, DIMENSIONS) == ROWS + 8
    assert sorted(first.paid) == [f"row {n} about something" for n in range(200, 204)]
    assert len(second.paid) == sampled + 4


def test_vectors_in_flight_from_an_endpoint_that_was_only_replaced_are_not_stored(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect]
) -> None:
    first, second = endpoints
    second.embed = lambda text, _: -vector_of(text, DIMENSIONS)
    gate = threading.Event()

    def embed(text: str, _: Body) -> Any:
        gate.wait(20)
        return vector_of(text, DIMENSIONS)

    create_pages(db)
    first.embed = embed
    with working(db):
        wait_until(lambda: first.requests, what="a request is in flight")
        alter(db, base_url=second.url)
        gate.set()
        wait_until(
            lambda: scalar(db, "SELECT pending = 0 AND backfill_complete FROM embedline.status"), what="all is done"
        )
    found = db.execute(
        f"SELECT c.content, v.embedding_v1::real[] FROM {PAGE('chunk')} AS c"
        f" JOIN {PAGE.version(1)} AS v USING (chunk_id)"
    ).fetchall()
    assert len(found) == ROWS
    for text, vector in found:
        assert float(np.dot(vector, vector_of(text, DIMENSIONS))) < 0


def test_the_same_holds_for_a_version_that_is_being_filled(
    db: psycopg.Connection, endpoints: tuple[Dialect, Dialect]
) -> None:
    second = endpoints[1]
    create_pages(db)
    settle(db)
    gate = threading.Event()

    def embed(text: str, _: Body) -> Any:
        gate.wait(20)
        return vector_of(text, DIMENSIONS)

    with serving(Dialect(DIMENSIONS)) as third:
        db.execute("SELECT embedline.create_model('next', 'openai', 'next', base_url => %s)", (third.url,))
        third.forget()
        third.embed = embed
        db.execute("SELECT embedline.add_embedding_version('page', 'next', index_method => 'none')")
        second.embed = lambda text, _: -vector_of(text, DIMENSIONS)
        with working(db):
            wait_until(lambda: third.requests, what="a request is in flight")
            db.execute("SELECT embedline.alter_model('next', base_url => %s)", (second.url,))
            gate.set()
            wait_until(lambda: data_count(db, "v2") == ROWS, what="the version is filled")
    for text, vector in db.execute(
        f"SELECT c.content, v.embedding_v2::real[] FROM {PAGE('chunk')} AS c"
        f" JOIN {PAGE.version(2)} AS v USING (chunk_id)"
    ):
        assert float(np.dot(vector, vector_of(text, DIMENSIONS))) < 0


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that the server's OS user can read, which pytest's tmp_path is not."""
    with tempfile.TemporaryDirectory(prefix="embedline-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_local_model_may_move_to_another_directory(module_database: psycopg.Connection, open_folder: Path) -> None:
    db = module_database
    shutil.copytree(MODELS / "static-256", open_folder / "moved")
    db.execute("SELECT embedline.create_model('here', 'sentence-transformers', %s)", (str(MODELS / "static-256"),))
    before = scalar(db, "SELECT fingerprint FROM embedline.model WHERE name = 'here'")
    db.execute("SELECT embedline.alter_model('here', model => %s)", (str(open_folder / "moved"),))
    assert scalar(db, "SELECT fingerprint FROM embedline.model WHERE name = 'here'") == before
    # A precision that is left open has the vectors of float32, so full precision is the same recipe.
    db.execute("""SELECT embedline.alter_model('here', options => '{"precision": "float32"}')""")
    assert scalar(db, "SELECT options ->> 'precision' FROM embedline.model WHERE name = 'here'") == "float32"
    assert scalar(db, "SELECT fingerprint FROM embedline.model WHERE name = 'here'") == before
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="decides its vectors"):
        db.execute("""SELECT embedline.alter_model('here', options => '{"precision": "int8"}')""")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="there is no model directory"):
        db.execute("SELECT embedline.alter_model('here', model => '/nowhere')")
    db.execute("SELECT embedline.drop_model('here')")


def test_only_superusers_alter_models(db: psycopg.Connection) -> None:
    db.execute("CREATE ROLE alter_model_admin LOGIN IN ROLE embedline_admin")
    try:
        with psycopg.connect(dsn_of(db), autocommit=True) as connection:
            connection.execute("SET ROLE alter_model_admin")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("SELECT embedline.alter_model('stub', concurrency => 2)")
    finally:
        db.execute("DROP ROLE alter_model_admin")


def test_a_model_that_is_not_there_is_told(db: psycopg.Connection) -> None:
    with pytest.raises(psycopg.errors.UndefinedObject, match='there is no model "none"'):
        db.execute("SELECT embedline.alter_model('none', concurrency => 2)")
