"""Write the chain of revisions that upgrades a pipeline's model.

Its phases are expand, index, cutover and contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic import util
from alembic.autogenerate import render_python_code
from alembic.config import Config
from alembic.operations.ops import DowngradeOps, UpgradeOps
from alembic.script import ScriptDirectory

from embedline.client.migrations.declaration import UpgradeSettings
from embedline.client.migrations.operations import (
    AddEmbeddingVersionOp,
    BuildVectorIndexOp,
    CreateModelOp,
    CutoverEmbeddingVersionOp,
    DropEmbeddingVersionOp,
    PipelineOperation,
)
from embedline.client.migrations.rendering import explain

PHASES = ("expand", "index", "cutover", "contract")


@dataclass(frozen=True)
class Upgrade:
    """A pipeline's way from the serving version to the one that `expand` adds."""

    expand: AddEmbeddingVersionOp
    serving: int
    serving_model: str
    settings: UpgradeSettings
    register: CreateModelOp | None = None
    serving_registration: CreateModelOp | None = None

    @property
    def pipeline(self) -> str:
        """Return the name of the pipeline."""
        return self.expand.pipeline

    def message(self, phase: str) -> str:
        """Return the title of a revision."""
        return f"{phase} version {self.expand.version} of {self.pipeline}"

    def operations(self, phase: str) -> list[PipelineOperation]:
        """Return a phase's operations, with the comments that go before them."""
        pipeline, version = self.pipeline, self.expand.version
        settings = self.settings
        match phase:
            case "expand":
                registration = [] if self.register is None else [self.register]
                return [*registration, explain(self.expand, self._about_expand())]
            case "index":
                build = BuildVectorIndexOp(pipeline, version, settings.wait_seconds)
                return [explain(build, self._about_index())]
            case "cutover":
                cutover = CutoverEmbeddingVersionOp(
                    pipeline,
                    version,
                    canaries=settings.canaries,
                    k=settings.k,
                    margin=settings.margin,
                    query_count=settings.query_count,
                )
                return [explain(cutover, self._about_cutover())]
            case _:
                contract = DropEmbeddingVersionOp(
                    pipeline,
                    self.serving,
                    settings.rollback_window,
                    model=self.serving_model,
                    registration=self._registration_again(),
                )
                return [explain(contract, self._about_contract())]

    def _registration_again(self) -> dict[str, Any] | None:
        """Return the arguments that register the serving model again, except its name."""
        if self.serving_registration is None:
            return None
        return {key: value for key, value in self.serving_registration.written().items() if key != "name"}

    def _about_expand(self) -> list[str]:
        return [
            f"Begins version {self.expand.version} ({self.expand.model}) beside version {self.serving} ({self.serving_model}).",
            "Each write goes to both from here on, workers fill it from the chunks that are there, and nothing reads it yet.",
            "Returns at once. Locks: short ones on the pipeline's generated tables. Undo: alembic downgrade -1.",
        ]

    def _about_index(self) -> list[str]:
        return [
            f"Builds the vector index of version {self.expand.version} CONCURRENTLY, in no transaction: reads and writes go on.",
            "Refuses until the backfill is complete (embedline.versions shows it): run alembic upgrade again then.",
            "Killed on the way: run it again. Undo: alembic downgrade -1 drops the index.",
        ]

    def _about_cutover(self) -> list[str]:
        return [
            f"Runs the gate (embedline.evaluate) where none has passed yet, then lets version {self.expand.version} serve.",
            "The swap is a transaction of its own under a short lock_timeout; refused without a passing gate.",
            f"alembic downgrade -1 is the rollback: at once, with all writes since, as version {self.serving} is still written.",
        ]

    def _about_contract(self) -> list[str]:
        return [
            f"Drops the tables of version {self.serving} ({self.serving_model}) and frees their disk.",
            "Refuses before the rollback window has ended: 48 hours after the cutover, unless rollback_window= says otherwise.",
            "Afterwards there is no way back: the downgrade raises with what to run instead.",
        ]


def reversed_operations(operations: Sequence[PipelineOperation]) -> DowngradeOps:
    """Return the downgrade of operations."""
    downgrade = DowngradeOps([])
    UpgradeOps(list(operations)).reverse_into(downgrade)
    return downgrade


def write_chain(config: Config, upgrade: Upgrade, *, head: str = "head", phases: Sequence[str] = PHASES) -> list[Path]:
    """Write a revision for each phase into the environment's versions folder.

    Returns the files in their order.
    """
    scripts = ScriptDirectory.from_config(config)
    written: list[Path] = []
    for phase in phases:
        operations = upgrade.operations(phase)
        script = scripts.generate_revision(
            util.rev_id(), upgrade.message(phase), head=head, refresh=True, config=config, imports="",
            upgrades=_body(UpgradeOps(list(operations))), downgrades=_body(reversed_operations(operations)),
        )  # fmt: skip
        assert script is not None, "the environment's own template wrote no revision"
        head = script.revision
        written.append(Path(script.path))
    return written


def _body(operations: UpgradeOps | DowngradeOps) -> str:
    return render_python_code(operations).replace(
        " auto generated by Alembic - please adjust!", " written by embedline"
    )
