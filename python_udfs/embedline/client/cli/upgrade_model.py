"""`embedline upgrade-model`: write the revisions of a model upgrade."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from embedline.client import terminal
from embedline.client.cli.application import INT4, UPGRADE, AsJson, Pipeline, Verbose, app, fail
from embedline.client.migration_display import quiet_alembic


@app.command("upgrade-model", rich_help_panel=UPGRADE)
def upgrade_model(
    pipeline: Pipeline,
    model: Annotated[str, typer.Option(help="Registered model, or one that embedline.toml declares.")],
    config: Annotated[Path, typer.Option(help="alembic.ini of the environment to write to.")] = Path("alembic.ini"),
    column_type: Annotated[Literal["vector", "halfvec"] | None, typer.Option(help="As it is, unless given.")] = None,
    distance: Annotated[Literal["cosine", "inner_product", "l2"] | None, typer.Option(help="The same.")] = None,
    chunking: Annotated[str | None, typer.Option(help="The same.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(min=1, max=INT4, help="The same.")] = None,
    chunk_overlap: Annotated[int | None, typer.Option(min=0, max=INT4, help="The same.")] = None,
    canaries: Annotated[str | None, typer.Option(help="Table of labelled queries for the gate.")] = None,
    backfill_order: Annotated[Literal["oldest_first", "newest_first"] | None, typer.Option()] = None,
    backfill_rate: Annotated[int | None, typer.Option(min=1, max=INT4, help="Chunks a second at most.")] = None,
    wait_seconds: Annotated[float | None, typer.Option(help="How long the index waits for the backfill.")] = None,
    rollback_window: Annotated[str | None, typer.Option(help="An interval; 48 hours unless given.")] = None,
    head: Annotated[str, typer.Option(help="Revision that the chain follows.")] = "head",
    contract: Annotated[bool, typer.Option(help="Write the last revision now, too.")] = True,
    verbose: Verbose = False,
    json: AsJson = False,
) -> None:
    """Write the revisions of a model upgrade into an Alembic environment.

    They are expand, index, cutover and contract.
    """
    recipe = _given(model=model, column_type=column_type, distance=distance, chunking=chunking)
    recipe |= _given(chunk_tokens=chunk_tokens, chunk_overlap=chunk_overlap)
    settings = _given(canaries=canaries, backfill_order=backfill_order, backfill_rate=backfill_rate)
    settings |= _given(wait_seconds=wait_seconds, rollback_window=rollback_window)
    with quiet_alembic(verbose):
        written, advice = _write_upgrade(config, pipeline, recipe, settings, head, contract)
    if json:
        typer.echo(terminal.as_json([{"phase": phase, "path": path} for phase, path in written.items()]))
        return
    for phase, path in written.items():
        typer.echo(f"{phase}: {path}")
    if advice:
        typer.echo(advice)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _write_upgrade(
    config: Path, pipeline: str, recipe: dict[str, Any], settings: dict[str, Any], head: str, contract: bool
) -> tuple[dict[str, str], str | None]:
    """Write the chain; return the path of each phase, and what else is to do."""
    from alembic.util import CommandError

    from embedline.client.migrations import chain, upgrade_model
    from embedline.client.migrations.declaration import find_declaration

    try:
        environment = upgrade_model.configuration(config)
        plan = upgrade_model.plan_upgrade(environment, pipeline, recipe, settings)
        phases = chain.PHASES if contract else chain.PHASES[:-1]
        paths = chain.write_chain(environment, plan, head=head, phases=phases)
        declaration = find_declaration(environment)
    except CommandError as error:
        fail(str(error))
    written = {phase: str(path) for phase, path in zip(phases, paths, strict=True)}
    if declaration is None or pipeline not in declaration.pipelines:
        return written, None
    return written, (
        f"Say the same in [pipelines.{pipeline}] of {declaration.path}, or autogenerate proposes the way back."
    )
