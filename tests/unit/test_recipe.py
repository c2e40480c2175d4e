"""Specs: what a caller leaves out, and names that stay identifiers of PostgreSQL."""

from __future__ import annotations

import pytest

from embedline.core import names
from embedline.core.recipe import BackfillSpec, ChunkingChoice, Expressions, IndexSpec, VersionChoice, VersionSpec
from embedline.pipelines.ddl.plan import FUNCTIONS, TABLES

_SERVING = VersionSpec("vector", "cosine", IndexSpec("hnsw", {"m": 24}))
# The longest name that create_pipeline takes, and PostgreSQL's limit of an identifier in bytes.
_LONGEST, _LIMIT = "p" * 40, 63


def choice(**given: object) -> VersionChoice:
    nothing = dict.fromkeys(("column_type", "distance", "index_method", "index_options"))
    parameters = {"model": "small", "chunking": ChunkingChoice(), "backfill": BackfillSpec("oldest_first")}
    return VersionChoice(**{**nothing, **parameters, **given})  # type: ignore[arg-type]


def test_a_version_takes_what_is_not_given_from_the_serving_one() -> None:
    assert choice().over(_SERVING) == _SERVING
    assert choice(distance="l2").over(_SERVING) == VersionSpec("vector", "l2", _SERVING.index)


def test_empty_index_options_replace_those_of_the_serving_version() -> None:
    assert choice(index_options={}).over(_SERVING).index == IndexSpec("hnsw", {})


def test_another_index_method_takes_no_options_of_the_serving_one() -> None:
    assert choice(index_method="ivfflat").over(_SERVING).index == IndexSpec("ivfflat", {})
    assert choice(index_method="hnsw").over(_SERVING).index == _SERVING.index


def test_expressions_differ_by_parameter() -> None:
    before = Expressions("body", filter="lang = 'en'")
    assert Expressions("body").differing(before) == ["filter"]
    assert before.only(["filter", "tenant"]) == Expressions(filter="lang = 'en'")


def test_options_of_a_chunking_alone_are_a_choice() -> None:
    assert not ChunkingChoice().is_given
    assert ChunkingChoice(options={}).is_given


@pytest.mark.parametrize(
    "name",
    [
        *(names.generated(_LONGEST, suffix) for suffix in (*FUNCTIONS, *TABLES)),
        *(names.trigger(_LONGEST, event) for event in names.EVENTS),
        *(names.generated(_LONGEST, names.capture_suffix(event)) for event in names.EVENTS),
        names.view(_LONGEST, 999),
        names.vector_index(_LONGEST, 999),
        names.vector_index(_LONGEST, 999, "prefix_1024"),
        names.of_version(_LONGEST, 999, "nearest"),
        names.generated(_LONGEST, f"{names.chunk_suffix(999)}_hash_idx"),
        names.generated(_LONGEST, "outbox_backfill_idx"),
        names.generated(_LONGEST, "document_state_check"),
    ],
)
def test_the_longest_pipeline_name_leaves_room_for_every_suffix(name: str) -> None:
    assert len(name.encode()) <= _LIMIT
