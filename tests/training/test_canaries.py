"""A gate does not ask queries that a model was trained on."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors

from conftest import Connect, MakeRole
from embedline.client.build_index import PsycopgClient, build
from fruit import create_fruit, record, register_fruit
from support import drain, scalar

_EVALUATE = "SELECT measure, verdict FROM embedline.evaluate('fruit', 2, 'canary')"
_LINEAGE = "SELECT trained_from, pairs_hash FROM embedline.versions WHERE pipeline = 'fruit' AND version = 2"
QUERIES = ["zab osta", "kru brill", "mel quen"]


@pytest.fixture
def upgraded(database: psycopg.Connection) -> str:
    """A second version with its index, and canaries; return its model's name."""
    create_fruit(database)
    tuned = register_fruit(database, "tuned", 1)
    database.execute("CREATE TABLE canary AS SELECT query, key FROM pair")
    database.execute("SELECT embedline.add_embedding_version('fruit', %s)", (tuned,))
    drain(database)
    build(PsycopgClient(database), "fruit", 2)
    return tuned


def test_a_gate_refuses_canaries_of_the_training_and_its_hint_removes_them(
    database: psycopg.Connection, upgraded: str
) -> None:
    record(database, upgraded, ["Zab, OSTA!", "kru brill"])
    with pytest.raises(
        errors.InvalidParameterValue, match=r"was trained on 2 of the 100 queries in public\.canary"
    ) as caught:
        database.execute(_EVALUATE)
    hint = caught.value.diag.message_hint
    assert hint is not None
    assert database.execute(hint.encode()).rowcount == 2
    assert ("verdict", "inconclusive") in database.execute(_EVALUATE).fetchall()


def test_held_out_queries_may_be_canaries(database: psycopg.Connection, upgraded: str) -> None:
    record(database, upgraded, ["another query"], held_out=QUERIES)
    assert database.execute(_EVALUATE).fetchall()


def test_the_training_of_the_serving_model_and_of_a_base_count_too(database: psycopg.Connection, upgraded: str) -> None:
    serving = str(scalar(database, "SELECT model FROM embedline.versions WHERE serving"))
    record(database, serving, QUERIES)
    with pytest.raises(errors.InvalidParameterValue, match=f'model "{serving}" was trained on 3'):
        database.execute(_EVALUATE)
    # The new model was made from one that has seen them.
    database.execute("DELETE FROM embedline.training")
    grandparent = register_fruit(database, "grandparent", 2)
    record(database, grandparent, QUERIES)
    record(database, upgraded, ["another query"])
    assert database.execute(_EVALUATE).fetchall()
    database.execute(
        "UPDATE embedline.training SET base_model = (SELECT model FROM embedline.model WHERE name = %s)"
        " WHERE model_id = (SELECT model_id FROM embedline.model WHERE name = %s)",
        (grandparent, upgraded),
    )
    with pytest.raises(errors.InvalidParameterValue, match=f'model "{upgraded}" was trained on 3'):
        database.execute(_EVALUATE)


def test_a_directory_under_another_name_is_known(database: psycopg.Connection, upgraded: str) -> None:
    record(database, upgraded, QUERIES)
    database.execute(
        "SELECT embedline.create_model('alias', 'sentence-transformers', model, query_prefix => 'query: ')"
        " FROM embedline.model WHERE name = %s",
        (upgraded,),
    )
    with pytest.raises(errors.InvalidParameterValue, match='model "alias" was trained on 3'):
        database.execute("SELECT embedline.preview_version('fruit', 'alias', 'canary')")


def test_stored_canaries_keep_a_trained_model_from_being_added_and_cut_over_to(
    database: psycopg.Connection, upgraded: str
) -> None:
    database.execute("SELECT embedline.set_canaries('fruit', 'canary')")
    record(database, upgraded, QUERIES)
    with pytest.raises(errors.InvalidParameterValue, match="trained on 3 of the 100 queries in the canaries"):
        database.execute("SELECT embedline.cutover('fruit', 2)")
    database.execute("SELECT embedline.drop_embedding_version('fruit', 2)")
    with pytest.raises(errors.InvalidParameterValue, match="trained on 3 of the 100 queries in the canaries"):
        database.execute("SELECT embedline.add_embedding_version('fruit', %s)", (upgraded,))
    database.execute("SELECT embedline.set_canaries('fruit', NULL)")
    database.execute("SELECT embedline.add_embedding_version('fruit', %s)", (upgraded,))


def test_set_canaries_refuses_what_the_serving_model_was_trained_on(database: psycopg.Connection) -> None:
    model = create_fruit(database)
    record(database, model, QUERIES)
    with pytest.raises(errors.InvalidParameterValue, match=r"was trained on 3 of the 100 queries in public\.pair"):
        database.execute("SELECT embedline.set_canaries('fruit', 'pair')")


def test_a_version_shows_what_its_model_was_trained_on_until_the_model_is_dropped(
    database: psycopg.Connection, upgraded: str
) -> None:
    assert database.execute(_LINEAGE).fetchall() == [(None, None)]
    record(database, upgraded, QUERIES)
    ((trained_from, pairs_hash),) = database.execute(_LINEAGE).fetchall()
    assert trained_from == "base"
    assert scalar(database, "SELECT pairs_hash FROM embedline.training") == pairs_hash
    database.execute("SELECT embedline.drop_embedding_version('fruit', 2)")
    database.execute("SELECT embedline.drop_model(%s)", (upgraded,))
    assert scalar(database, "SELECT count(*) FROM embedline.training_pair") == 0


def test_only_a_superuser_records_a_training_and_only_administrators_read_pairs(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    model = create_fruit(database)
    record(database, model, QUERIES)
    admin, reader = connect(make_role("embedline_admin")), connect(make_role("embedline_reader"))
    assert scalar(admin, "SELECT count(*) FROM embedline.training_pair") == 3
    with pytest.raises(errors.InsufficientPrivilege):
        admin.execute("SELECT embedline._record_training('x', '{}', '[]')")
    with pytest.raises(errors.InsufficientPrivilege):
        reader.execute("SELECT * FROM embedline.training_pair")
    assert scalar(reader, "SELECT embedline.query_hash('Zab  osta?') = embedline.query_hash('zab osta')")
