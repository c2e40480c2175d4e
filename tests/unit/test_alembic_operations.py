"""The Alembic operations without a server: how they load, stand in revision files, render as SQL and are reversed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from alembic.autogenerate import render_python_code
from alembic.operations import Operations
from alembic.operations.ops import MigrateOperation, UpgradeOps
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError

from embedline.client.migrations import declaration, plugin, rendering
from embedline.client.migrations import operations as ops
from embedline.client.migrations.chain import PHASES, Upgrade
from embedline.client.migrations.declaration import UpgradeSettings
from embedline.client.migrations.statements import Cast, call, literal


def _rendered(change: Callable[[Operations], object]) -> str:
    """Return the script that a revision makes under --sql."""
    buffer = io.StringIO()
    context = MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True, "output_buffer": buffer})
    change(Operations(context))
    return buffer.getvalue()


def _python(operation: MigrateOperation) -> str:
    assert rendering.render
    return render_python_code(UpgradeOps([operation]))


def test_the_entry_point_is_a_module_that_older_alembics_can_iterate() -> None:
    """1.18 and 1.19 iterate over what the entry point loads, later ones want a module: either kills `import alembic`."""
    assert isinstance(plugin, ModuleType)
    assert list(plugin) == [plugin]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "NULL"),
        (True, "true"),
        (7, "7"),
        (0.5, "0.5"),
        ("it's", "'it''s'"),
        ("a\\nb", "E'a\\\\nb'"),
        ({"m": 16}, "'{\"m\": 16}'::jsonb"),
        (["filter"], "ARRAY['filter']::text[]"),
        (Cast("Order", "regclass"), "'Order'::regclass"),
    ],
)
def test_values_become_constants(value: object, expected: str) -> None:
    assert literal(value) == expected


def test_arguments_that_are_not_given_are_left_to_the_function() -> None:
    assert call("f", {"a": 1, "b": None}) == "SELECT embedline.f(a => 1)"


def test_colons_and_percent_signs_pass_through_a_script() -> None:
    content = "title || ':body %s' || body::text"
    rendered = _rendered(lambda op: op.create_pipeline("docs", "public.docs", content, "static-256"))  # type: ignore[attr-defined]
    assert "content => 'title || '':body %s'' || body::text'" in rendered
    assert "source => 'public.docs'::regclass" in rendered


def test_changes_of_a_source_are_rendered_and_need_their_reverse() -> None:
    statement = "ALTER TABLE docs ALTER COLUMN a TYPE text USING ':x %s'"
    rendered = _rendered(lambda op: op.alter_source("docs", statement))  # type: ignore[attr-defined]
    assert "alter_source(source => 'docs'::regclass, statement => 'ALTER TABLE docs" in rendered
    assert ":x %s" in rendered
    rendered = _rendered(lambda op: op.move_pipeline("docs", "public.other"))  # type: ignore[attr-defined]
    assert "move_pipeline(name => 'docs', new_source => 'public.other'::regclass)" in rendered
    for operation in (ops.AlterSourceOp("docs", statement), ops.MovePipelineOp("docs", "other")):
        with pytest.raises(ValueError, match=r"give (reverse_statement|old_source)"):
            operation.reverse()


def test_expand_stops_a_script_where_the_version_gets_another_number() -> None:
    rendered = _rendered(lambda op: op.add_embedding_version("docs", version=2, model="minilm", backfill_rate=50))  # type: ignore[attr-defined]
    assert (
        "embedline.add_embedding_version(model => 'minilm', backfill_rate => 50, pipeline_name => 'docs') <> 2"
        in rendered
    )
    parts = ["COMMIT;", "RAISE EXCEPTION", "BEGIN;"]
    assert [part for part in sorted(parts, key=rendered.rindex)] == parts


def test_the_index_stops_a_script_that_comes_before_it_is_built() -> None:
    rendered = _rendered(lambda op: op.build_vector_index("docs", version=2))  # type: ignore[attr-defined]
    assert "embedline.index_statement('docs', 2) IS NOT NULL" in rendered
    assert "embedline build-index docs --version 2" in rendered
    # What came before is committed where it stops.
    assert rendered.index("COMMIT;") < rendered.index("RAISE EXCEPTION")


def test_a_cutover_commits_at_once_in_a_script() -> None:
    rendered = _rendered(lambda op: op.cutover_embedding_version("docs", version=2, canaries="canary"))  # type: ignore[attr-defined]
    parts = ["COMMIT;", "canaries => 'canary'::regclass", "embedline.cutover(", "BEGIN;"]
    assert sorted(parts, key=rendered.index) == parts


def test_a_mode_is_measured_before_it_is_used_in_a_script() -> None:
    rendered = _rendered(lambda op: op.use_mode("docs", version=2, mode="hybrid", canaries="canary"))  # type: ignore[attr-defined]
    parts = ["COMMIT;", "canaries => 'canary'::regclass, mode => 'hybrid'", "embedline.use_mode(", "BEGIN;"]
    assert sorted(parts, key=rendered.index) == parts
    undone = _rendered(lambda op: op.invoke(ops.UseModeOp("docs", 2, "hybrid", canaries="canary").reverse()))
    assert "evaluate" not in undone
    assert "mode => 'vector'" in undone


def test_an_override_does_not_run_the_gate() -> None:
    rendered = _rendered(lambda op: op.cutover_embedding_version("docs", version=2, override_reason="it's urgent"))  # type: ignore[attr-defined]
    assert "evaluate" not in rendered
    assert "override_reason => 'it''s urgent'" in rendered


def test_the_downgrade_of_a_contract_says_what_to_run() -> None:
    with pytest.raises(CommandError, match="embedline upgrade-model docs --model static-256"):
        _rendered(lambda op: op.restore_embedding_version("docs", version=1, model="static-256"))  # type: ignore[attr-defined]


_EVERY = [
    ops.CreateModelOp("m", "openai", "text-embedding-3-small", dimensions=256, options={"a": 1}),
    ops.CreatePipelineOp(
        "docs", "docs", "title || E'\\n' || body", "m", chunk_tokens=128, index_options={"m": 8}, keyword="simple"
    ),
    ops.AlterPipelineOp("docs", content="body", drop=("filter",), before={"content": "title", "filter": "live"}),
    ops.MovePipelineOp("docs", "public.docs_2", "public.docs"),
    ops.AlterSourceOp("docs", "ALTER TABLE docs DROP COLUMN a", "ALTER TABLE docs ADD COLUMN a text"),
    ops.AddEmbeddingVersionOp("docs", 2, "m", column_type="halfvec", backfill_order="newest_first"),
    ops.DropEmbeddingVersionOp("docs", 1, model="m"),
    ops.BuildVectorIndexOp("docs", 2, wait_seconds=30),
    ops.CutoverEmbeddingVersionOp("docs", 2, canaries="canary"),
    ops.UseModeOp("docs", 2, "hybrid", canaries="canary", mode_before="keyword"),
]


@pytest.mark.parametrize("operation", _EVERY, ids=lambda operation: operation.operation)
def test_what_a_revision_file_says_is_the_operation(operation: ops.PipelineOperation) -> None:
    """The code that is written, run, invokes an operation that says the same; so does that of its reverse."""
    for each in (operation, operation.reverse()):
        body = "\n".join(line.strip() for line in _python(each).splitlines() if not line.strip().startswith("#"))
        invoked: list[ops.PipelineOperation] = []

        class Recorder(Operations):
            def __init__(self) -> None:
                pass

            def invoke(self, operation: MigrateOperation) -> None:  # type: ignore[override]
                assert isinstance(operation, ops.PipelineOperation)
                invoked.append(operation)  # noqa: B023

        exec(body, {"op": Recorder()})
        written = {name: list(v) if isinstance(v, tuple) else v for name, v in each.written().items()}
        assert [other.written() for other in invoked] == [written]


def test_reversing_twice_comes_back() -> None:
    for operation in _EVERY:
        back = operation.reverse().reverse()
        if operation.operation == "build_vector_index":
            assert back.to_diff_tuple() == ("build_vector_index", "docs", 2)
        elif operation.operation == "cutover_embedding_version":
            assert back.to_diff_tuple() == ("cutover_embedding_version", "docs", 2)
        else:
            assert back.written() == operation.written()


def test_the_chain_explains_itself_and_ends_with_what_has_no_way_back() -> None:
    expand = ops.AddEmbeddingVersionOp("docs", 2, "minilm")
    upgrade = Upgrade(expand, 1, "static-256", UpgradeSettings(canaries="canary", rollback_window="1 hour"))
    bodies = {phase: "\n".join(map(_python, upgrade.operations(phase))) for phase in PHASES}
    assert "op.add_embedding_version('docs', version=2, model='minilm')" in bodies["expand"]
    assert "op.build_vector_index('docs', version=2)" in bodies["index"]
    assert "op.cutover_embedding_version('docs', version=2, canaries='canary')" in bodies["cutover"]
    assert "op.drop_embedding_version('docs', version=1, rollback_window='1 hour')" in bodies["contract"]
    assert all("\n    # " in body for body in bodies.values())


def _declare(folder: Path, text: str) -> declaration.Declaration:
    path = folder / "embedline.toml"
    path.write_text(text, encoding="utf-8")
    return declaration.read_declaration(path)


def test_a_declaration_becomes_operations(tmp_path: Path) -> None:
    declared = _declare(
        tmp_path,
        """
        [models.small]
        provider = "openai"
        model = "text-embedding-3-small"

        [pipelines.docs]
        source = "public.docs"
        content = "title || E'\\\\n' || body"
        model = "small"
        index_options = {m = 24}
        weight = 2

        [pipelines.docs.upgrade]
        canaries = "canary"

        [drop]
        pipelines = ["old"]
        """,
    )
    assert declared.models["small"].written() == {
        "name": "small", "provider": "openai", "model": "text-embedding-3-small",
    }  # fmt: skip
    docs = declared.pipelines["docs"]
    assert docs.create.content == "title || E'\\n' || body"
    assert docs.upgrade == UpgradeSettings(canaries="canary")
    assert declared.drop_pipelines == ("old",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[pipeline.docs]", 'no table "pipeline"'),
        ("[pipelines.docs]\nsource = 'docs'\ncontent = 'body'", "needs model"),
        ("[pipelines.docs]\nsource = 'd'\ncontent = 'b'\nmodel = 'm'\ndimension = 3", 'no key "dimension"'),
        ("[pipelines.docs]\nsource = 'd'\ncontent = 'b'\nmodel = 'm'\n[drop]\npipelines = ['docs']", "listed in drop"),
        ("[pipelines.d]\nsource = 'd'\ncontent = 'b'\nmodel = 64", "model is 64.*must be a string"),
        (
            "[pipelines.d]\nsource = 'd'\ncontent = 'b'\nmodel = 'm'\ntenant = 2020-01-01",
            "tenant is .*must be a string",
        ),
        ("[pipelines.d]\nsource = 'd'\ncontent = 'b'\nmodel = 'm'\nchunk_tokens = '64'", "must be a whole number"),
        ("[pipelines.d]\nsource = 'd'\ncontent = 'b'\nmodel = 'm'\nchunk_tokens = true", "must be a whole number"),
        ("[pipelines.d]\nsource = 'd'\ncontent = 'b'\nmodel = 'm'\nweight = 'two'", "must be a number"),
        ("[pipelines.d]\nsource = 'd'\ncontent = 'b'\nmodel = 'm'\nindex_options = 3", "must be a table"),
        ("[pipelines.d]\nsource = 'd'\ncontent = 'b'\nmodel = 'm'\ncolumn_type = 'halvec'", "one of vector, halfvec"),
        ("[pipelines.d]\nsource = 'd'\ncontent = 'b'\nmodel = 'm'\nchunking = 'words'", "one of recursive"),
        ("[pipelines.d]\nsource = 'd'\ncontent = 'b'\nmodel = 'm'\n[pipelines.d.upgrade]\nk = 'ten'", "a whole number"),
        ("[drop]\ntables = ['x']", "list of names"),
        ("x = ", "is not TOML"),
    ],
)
def test_a_wrong_declaration_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        _declare(tmp_path, text)
