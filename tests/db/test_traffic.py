"""Gradual cutovers: shares that stick, tenants, shadow reads."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg import errors

from embedline.search.version_choice import drawn
from small_models import register_static
from support import create_pages, create_pipeline, scalar, searching, settle
from upgrading import add_version, cut_over, settle_versions


@pytest.fixture
def two(database: psycopg.Connection) -> psycopg.Connection:
    """Pipeline page over 40 rows with versions 1 (static-256, serving) and 2 (static-16), whose scores differ."""
    create_pages(database, 40)
    create_pipeline(database, index_method="none")
    register_static(database, 16)
    settle(database)
    add_version(database, "static-16")
    settle_versions(database)
    return database


def score(connection: psycopg.Connection, **options: Any) -> float:
    """Return the best score of a search: it tells the versions apart."""
    return searching(connection, "page", "Title 1 about rivers", 1, **options)[0][2]


def test_a_share_of_callers_is_served_by_the_new_version_and_each_stays_with_it(two: psycopg.Connection) -> None:
    old = score(two)
    two.execute("SELECT embedline.set_traffic('page', 2, share => 0.5)")
    callers = [f"caller {i}" for i in range(20)]
    first = {caller: score(two, session_key=caller) for caller in callers}
    assert {caller for caller in callers if first[caller] != old} == {c for c in callers if drawn(c, "page") < 0.5}
    assert 0 < sum(first[caller] != old for caller in callers) < 20
    assert first == {caller: score(two, session_key=caller) for caller in callers}
    two.execute("SELECT embedline.set_traffic('page', NULL)")
    assert {score(two, session_key=caller) for caller in callers} == {old}


def test_a_tenant_can_be_cut_over_alone_and_kept_back(two: psycopg.Connection) -> None:
    old = score(two)
    two.execute("SELECT embedline.set_tenant_version('page', 'acme', 2)")
    new = score(two, tenant="acme")
    assert new != old
    assert score(two, tenant="other") == score(two) == old
    two.execute("SELECT embedline.set_tenant_version('page', 'slow', 1)")
    cut_over(two, 2)
    assert score(two) == score(two, tenant="acme") == new
    assert score(two, tenant="slow") == old
    two.execute("SELECT embedline.set_tenant_version('page', 'slow', NULL)")
    assert score(two, tenant="slow") == new


def test_shadow_reads_note_overlap_and_time_and_nothing_of_the_query(two: psycopg.Connection) -> None:
    two.execute("SELECT embedline.set_traffic('page', 2, shadow_share => 1)")
    before = searching(two, "page", "secret rivers", 5)
    rows = two.execute(
        "SELECT k, overlap, serving_seconds > 0, shadow_seconds > 0 FROM embedline.shadow_read"
    ).fetchall()
    assert [(row[0], row[2], row[3]) for row in rows] == [(5, True, True)]
    assert 0 <= rows[0][1] <= 1
    assert "secret" not in str(two.execute("TABLE embedline.shadow_read").fetchall())
    with two.transaction():
        two.execute("SET TRANSACTION READ ONLY")
        assert searching(two, "page", "secret rivers", 5) == before


def test_a_shadow_that_fails_is_not_the_callers_trouble(two: psycopg.Connection) -> None:
    two.execute("SELECT embedline.set_traffic('page', 2, shadow_share => 1)")
    two.execute("DROP FUNCTION embedline_search.page_v2_nearest, embedline_search.page_v2_search")
    assert len(searching(two, "page", "rivers", 5)) == 5
    assert scalar(two, "SELECT count(*) FROM embedline.shadow_read") == 0


def test_a_version_that_is_not_complete_serves_nobody(two: psycopg.Connection) -> None:
    two.execute("UPDATE embedline.version SET state = 'backfilling' WHERE number = 2")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="still being filled"):
        two.execute("SELECT embedline.set_traffic('page', 2, share => 0.5)")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="still being filled"):
        two.execute("SELECT embedline.set_tenant_version('page', 'acme', 2)")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_nothing_and_all(two: psycopg.Connection, share: float) -> None:
    with pytest.raises(errors.InvalidParameterValue, match="between 0 and 1"):
        two.execute("SELECT embedline.set_traffic('page', 2, share => %s)", (share,))
