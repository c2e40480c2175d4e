"""The calls of a remote worker: what they hand out, what they refuse, and what is left behind by one that is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import psycopg
import pytest
from psycopg import errors

from generated_names import Generated
from stub_provider import StubProvider, vector_of
from support import scalar, settle, wait_until
from working import (
    Worker,
    assert_all_settled,
    create_stub_model,
    dead_letters,
    dsn_of,
    insert_rows,
    make_reading_deadly,
)

Claims = list[tuple[int, int, list[str]]]


def _claim(remote: psycopg.Connection, pipeline: str = "page", **limits: int) -> tuple[str, Claims]:
    """Return the state of a claim, and what was handed out: number, fence, texts.

    What a call claims is read by the next one.
    """
    named = "".join(f", {name} => %s" for name in limits)
    query, rows = f"SELECT * FROM embedline.claim_batch(%s{named})", [("claimed",)]
    while rows[0][0] == "claimed":
        rows = remote.execute(query, (pipeline, *limits.values())).fetchall()
    return rows[0][0], [(number, fence, texts) for _, number, fence, texts in rows if number is not None]


def _vectors(texts: Sequence[str], dimensions: int) -> bytes:
    return np.stack([vector_of(text, dimensions) for text in texts]).astype("<f4").tobytes()


def _finish(remote: psycopg.Connection, claims: Claims, dimensions: int) -> int:
    """Hand the stub's vectors back; return how many rows are embedded by it."""
    call = "SELECT embedline.finish_batch(%s, %s, %s, %s)"
    return sum(
        int(scalar(remote, call, (number, fence, _vectors(texts, dimensions), len(texts))))
        for number, fence, texts in claims
    )


def _claim_all(remote: psycopg.Connection) -> Claims:
    """Claim until nothing more is handed out."""
    found: Claims = []
    while True:
        state, claims = _claim(remote)
        if state != "batch":
            return found
        found += claims


@pytest.fixture
def remote(page: psycopg.Connection, remote_dsn: str) -> Iterator[psycopg.Connection]:
    """A session of the remote login."""
    with psycopg.connect(remote_dsn, autocommit=True) as connection:
        yield connection


def test_texts_are_handed_out_and_their_vectors_written(
    page: psycopg.Connection, remote: psycopg.Connection, stub: StubProvider
) -> None:
    claims = _claim_all(remote)
    assert sorted(len(texts) for _, _, texts in claims) == [5, 10, 10]
    assert len({number for number, _, _ in claims}) == 3
    assert _finish(remote, claims, stub.dimensions) == 25
    wait_until(lambda: _claim(remote)[0] == "empty", 10, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 25
    assert stub.counts().get("requests", 0) == 0, "the server has asked the model itself"
    assert scalar(page, "SELECT login IS NOT NULL FROM embedline.worker")
    remote.execute("SELECT embedline.release_batches()")
    assert scalar(page, "SELECT count(*) FROM embedline.worker") == 0


def test_a_row_that_changes_in_flight_keeps_no_vector_of_its_old_text(
    page: psycopg.Connection, remote: psycopg.Connection, stub: StubProvider
) -> None:
    claims = _claim_all(remote)
    page.execute("UPDATE page SET body = 'edited' WHERE id = 3")
    page.execute("DELETE FROM page WHERE id = 4")
    _finish(remote, claims, stub.dimensions)
    again = _claim_all(remote)
    assert [texts for _, _, texts in again] == [["edited"]]
    _finish(remote, again, stub.dimensions)
    wait_until(lambda: _claim(remote)[0] == "empty", 10, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 24


@pytest.mark.parametrize("is_changed_first", [True, False])
def test_a_row_of_the_backfill_that_is_changed_is_in_flight_once(
    page: psycopg.Connection, remote: psycopg.Connection, remote_dsn: str, stub: StubProvider, is_changed_first: bool
) -> None:
    edit = "UPDATE page SET body = body || ' edited' WHERE id <= 20"
    if is_changed_first:
        # The changes are claimed by the one worker, the range of the same rows by the other.
        page.execute(edit)
        _, first = _claim(remote)
    else:
        # A range that is claimed is read after the change, which the other worker claims.
        assert scalar(remote, "SELECT state FROM embedline.claim_batch('page')") == "claimed"
        page.execute(edit)
        first = []
    with psycopg.connect(remote_dsn, autocommit=True) as other:
        second = _claim_all(other)
        first += _claim_all(remote)
        seen = [text for _, _, texts in [*first, *second] for text in texts]
        assert sorted(seen) == sorted(set(seen))
        assert len(seen) == 25
        _finish(other, second, stub.dimensions)
        _finish(remote, first, stub.dimensions)
        # Rows that the other worker had in flight wait for an instant, and prove to be up to date.
        wait_until(lambda: _claim(other)[0] == "empty", 10, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 25


def test_limits_bound_what_is_handed_out(page: psycopg.Connection, remote: psycopg.Connection) -> None:
    _, few = _claim(remote, max_rows=3)
    assert sum(len(texts) for _, _, texts in few) <= 25
    _, (one, *others) = _claim(remote, max_tokens=1)
    assert len(one[2]) >= 1
    assert not others
    with pytest.raises(errors.InvalidParameterValue, match="max_rows must be at least 1"):
        _claim(remote, max_rows=0)


def test_a_version_is_filled_from_outside(
    page: psycopg.Connection, remote: psycopg.Connection, stub: StubProvider
) -> None:
    _finish(remote, _claim_all(remote), stub.dimensions)
    create_stub_model(page, stub, "other", document_prefix="read: ")
    page.execute("SELECT embedline.add_embedding_version('page', 'other', index_method => 'none')")
    assert _claim(remote, version=1)[0] != "batch"
    found = 0
    while found < 25:
        state, claims = _claim(remote, version=2)
        found += _finish(remote, claims, stub.dimensions)
        assert state in ("batch", "idle")
    wait_until(lambda: _claim(remote, version=2)[0] == "empty", 10, "nothing waits")
    assert scalar(page, f"SELECT count(*) FROM {Generated('page').version(2)}") == 25


def test_a_worker_in_the_database_leaves_an_exclusive_pipeline_alone(
    page: psycopg.Connection, login: str, stub: StubProvider
) -> None:
    assert scalar(page, "SELECT embedline.embed_pending(100)") == 0
    with Worker(dsn_of(page), until_idle=True, seconds=30) as worker:
        worker.join()
    assert worker.error is None
    assert stub.counts().get("requests", 0) == 0
    page.execute("SELECT embedline.grant_remote('page', %s)", (login,))
    settle(page)
    assert assert_all_settled(page, stub.dimensions) == 25


def test_a_lost_connection_frees_its_rows_and_an_old_fence_writes_nothing(
    page: psycopg.Connection, remote: psycopg.Connection, remote_dsn: str, stub: StubProvider
) -> None:
    claims = _claim_all(remote)
    remote.close()
    with psycopg.connect(remote_dsn, autocommit=True) as other:
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="does not hold the lease"):
            _finish(other, claims, stub.dimensions)
        again: Claims = []

        def all_claimed() -> bool:
            again.extend(_claim_all(other))
            return sum(len(texts) for _, _, texts in again) == 25

        wait_until(all_claimed, 20, "the rows are free")
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="does not hold the lease"):
            _finish(other, claims, stub.dimensions)
        _finish(other, again, stub.dimensions)
        wait_until(lambda: _claim(other)[0] == "empty", 10, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 25


def _narrow(vectors: bytes, dimensions: int) -> bytes:
    return vectors[: -4 * dimensions] + vectors[-4 * dimensions : -4]


def _with_nan(vectors: bytes, dimensions: int) -> bytes:
    return vectors[:-4] + np.float32("nan").tobytes()


def _with_zero(vectors: bytes, dimensions: int) -> bytes:
    return vectors[: -4 * dimensions] + bytes(4 * dimensions)


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        (_narrow, "bytes are not 10 vectors of"),
        (lambda vectors, dimensions: vectors[: -4 * dimensions], "bytes are not 10 vectors of"),
        (lambda vectors, dimensions: vectors + bytes(4 * dimensions), "bytes are not 10 vectors of"),
        (_with_nan, "not a finite number, at text 10 of 10"),
        (_with_zero, "norm zero, at text 10 of 10"),
    ],
)
def test_a_worker_that_lies_is_refused_and_named(
    page: psycopg.Connection,
    remote: psycopg.Connection,
    login: str,
    stub: StubProvider,
    lie: Callable[[bytes, int], bytes],
    told: str,
) -> None:
    claims = _claim_all(remote)
    number, fence, texts = next(claim for claim in claims if len(claim[2]) == 10)
    vectors = lie(_vectors(texts, stub.dimensions), stub.dimensions)
    with pytest.raises(psycopg.Error) as refused:
        remote.execute("SELECT embedline.finish_batch(%s, %s, %s)", (number, fence, vectors))
    assert refused.value.sqlstate == "EL014"
    message = refused.value.diag.message_primary or ""
    assert told in message
    assert f'of "{login}"' in message
    # The claim is as it was: the truth may still be told.
    assert _finish(remote, claims, stub.dimensions) == 25
    assert assert_all_settled(page, stub.dimensions) == 25


def test_unknown_and_spent_claims_are_refused(
    page: psycopg.Connection, remote: psycopg.Connection, login: str, stub: StubProvider
) -> None:
    claims = _claim_all(remote)
    number, fence, texts = claims[0]
    vectors = _vectors(texts, stub.dimensions)
    call = "SELECT embedline.finish_batch(%s, %s, %s)"
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match=f'of "{login}" has no claim 4711'):
        remote.execute(call, (4711, fence, vectors))
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="does not hold the lease"):
        remote.execute(call, (number, fence + 1, vectors))
    remote.execute(call, (number, fence, vectors))
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match=f"has no claim {number}"):
        remote.execute(call, (number, fence, vectors))
    with pytest.raises(errors.InvalidParameterValue, match='no class of failures "broken"'):
        remote.execute("SELECT embedline.fail_batch(%s, %s, 'broken')", claims[1][:2])


def test_the_text_that_fails_is_found_by_halves(
    page: psycopg.Connection, remote: psycopg.Connection, stub: StubProvider
) -> None:
    page.execute("UPDATE page SET body = 'poison' WHERE id = 7")
    requests = 0

    def is_through() -> bool:
        nonlocal requests
        state, claims = _claim(remote)
        for claim in claims:
            requests += 1
            if "poison" in claim[2]:
                remote.execute("SELECT embedline.fail_batch(%s, %s, 'rejected', 'no poison, please')", claim[:2])
            else:
                _finish(remote, [claim], stub.dimensions)
        return state == "empty"

    wait_until(is_through, 30, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 24
    (letter,) = dead_letters(page).values()
    assert "no poison, please" in letter[2]
    assert requests <= 3 + 2 * 4 + 3


def test_a_failure_of_the_model_opens_the_circuit_and_charges_no_row(
    page: psycopg.Connection, remote: psycopg.Connection, stub: StubProvider
) -> None:
    _, claims = _claim(remote)
    for number, fence, _ in claims:
        remote.execute("SELECT embedline.fail_batch(%s, %s, 'unreachable', 'no route to host', 60)", (number, fence))
    assert _claim(remote)[0] == "idle"
    assert scalar(page, "SELECT open_until > now() FROM embedline.circuit")
    page.execute("SELECT embedline.resume_model('stub')")
    wait_until(lambda: _finish(remote, _claim(remote)[1], stub.dimensions) > 0, 10, "work goes on")
    wait_until(lambda: _finish(remote, _claim(remote)[1], stub.dimensions) or _claim(remote)[0] == "empty", 10, "all")
    assert not dead_letters(page)


def test_calls_in_one_transaction_are_refused(page: psycopg.Connection, remote: psycopg.Connection) -> None:
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="transactions of their own"), remote.transaction():
        _claim(remote)
        _claim(remote)


def test_what_was_handed_out_by_a_transaction_that_was_rolled_back_is_free(
    page: psycopg.Connection, remote: psycopg.Connection, stub: StubProvider
) -> None:
    remote.execute("SELECT * FROM embedline.claim_batch('page')")
    with remote.transaction() as transaction:
        _, claims = _claim(remote)
        raise psycopg.Rollback(transaction)
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="does not hold the lease"):
        _finish(remote, claims, stub.dimensions)
    assert _finish(remote, _claim_all(remote), stub.dimensions) == 25
    assert assert_all_settled(page, stub.dimensions) == 25


def test_a_stricter_isolation_is_refused(page: psycopg.Connection, remote: psycopg.Connection) -> None:
    remote.execute("SET default_transaction_isolation = 'serializable'")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="committed since") as refused:
        _claim(remote)
    assert "read committed" in (refused.value.diag.message_hint or "")


def test_a_login_without_a_grant_gets_nothing_and_learns_nothing(
    page: psycopg.Connection, remote: psycopg.Connection, login: str
) -> None:
    page.execute("SELECT embedline.revoke_remote('page', %s)", (login,))
    told = []
    for pipeline in ("page", "no such pipeline"):
        for query in ("SELECT embedline.remote_model(%s)", "SELECT * FROM embedline.claim_batch(%s)"):
            with pytest.raises(errors.InsufficientPrivilege) as refused:
                remote.execute(query, (pipeline,))
            told.append((refused.value.diag.message_primary or "").replace(pipeline, "…"))
    assert len(set(told)) == 1
    with pytest.raises(errors.UndefinedObject, match="was not granted"):
        page.execute("SELECT embedline.revoke_remote('page', %s)", (login,))
    with pytest.raises(errors.InsufficientPrivilege):
        remote.execute("SELECT embedline.grant_remote('page', %s)", (login,))


def test_the_role_can_do_nothing_else(page: psycopg.Connection, remote: psycopg.Connection) -> None:
    for statement in (
        "SELECT * FROM page",
        "SELECT * FROM embedline.pipeline",
        "SELECT * FROM embedline.search('page', 'text')",
        "SELECT embedline.embed_pending(1)",
        "CALL embedline.run_worker()",
        f"SELECT * FROM {Generated('page')('chunk')}",
        "SELECT * FROM embedline.dead_letter",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            remote.execute(statement.encode())


def test_a_stop_that_is_asked_for_ends_the_claims(page: psycopg.Connection, remote: psycopg.Connection) -> None:
    _claim(remote)
    page.execute("UPDATE embedline.worker SET stop_requested = true")
    wait_until(lambda: _claim(remote)[0] == "stop", 10, "the worker is told")


def test_a_cancel_accuses_only_the_rows_that_were_read_then(
    page: psycopg.Connection, remote: psycopg.Connection, login: str
) -> None:
    make_reading_deadly(page, login, "RAISE query_canceled")
    insert_rows(page, 1, 25)
    assert sum(len(texts) for _, _, texts in _claim_all(remote)) == 25
    page.execute("INSERT INTO page VALUES (26, 'deadly'), (27, 'beside it')")
    with pytest.raises(errors.QueryCanceled):
        _claim(remote)
    remote.execute("SELECT embedline.release_batches()")
    remote.execute("SELECT embedline.claim_batch('page')")
    suspected = page.execute(
        f"SELECT key_id FROM {Generated('page')('outbox')} WHERE crash_count > 0 ORDER BY 1"
    ).fetchall()
    assert suspected == [(26,), (27,)]


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "-Infinity"])
def test_a_wait_that_is_no_number_loses_no_claim(
    page: psycopg.Connection, remote: psycopg.Connection, seconds: str
) -> None:
    _, claims = _claim(remote)
    for number, fence, _ in claims:
        call = "SELECT embedline.fail_batch(%s, %s, 'throttled', NULL, %s::float8)"
        remote.execute(call, (number, fence, seconds))
    assert scalar(page, "SELECT open_until < now() + interval '6 minutes' FROM embedline.circuit")
    assert scalar(page, "SELECT last_error FROM embedline.status") == "The embedding provider is unavailable for now."


def test_vectors_that_are_null_are_refused_in_words(page: psycopg.Connection, remote: psycopg.Connection) -> None:
    _, ((number, fence, _), *_) = _claim(remote)
    with pytest.raises(psycopg.Error, match="NULL is not 10 vectors of") as refused:
        remote.execute("SELECT embedline.finish_batch(%s, %s, NULL)", (number, fence))
    assert refused.value.sqlstate == "EL014"
    assert refused.value.diag.message_hint
