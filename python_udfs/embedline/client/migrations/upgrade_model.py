"""Plan an upgrade for `embedline upgrade-model`.

The catalogue is read through the environment's own env.py.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from embedline.client.migrations import comparison
from embedline.client.migrations.catalogue import Catalogue, StoredPipeline, is_installed, read_catalogue
from embedline.client.migrations.chain import Upgrade
from embedline.client.migrations.comparison import planned_upgrade
from embedline.client.migrations.declaration import Declaration, DeclaredPipeline, UpgradeSettings, find_declaration
from embedline.client.migrations.operations import CreatePipelineOp


def configuration(path: Path) -> Config:
    """Return the configuration of an Alembic environment.

    It is an alembic.ini, or a pyproject.toml with [tool.alembic].
    """
    if not path.is_file():
        raise CommandError(f"there is no {path}. HINT: embedline upgrade-model --config PATH names the alembic.ini.")
    # The caller prints the written files, so Alembic need not.
    options = Namespace(quiet=True, x=None)
    if path.suffix == ".toml":
        return Config(toml_file=str(path), cmd_opts=options)
    beside = path.parent / "pyproject.toml"
    return Config(str(path), toml_file=str(beside) if beside.is_file() else None, cmd_opts=options)


def plan_upgrade(config: Config, name: str, recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> Upgrade:
    """Return the upgrade of a pipeline to another recipe.

    `settings` override those of the TOML file.
    """
    catalogue = _catalogue(config)
    declaration = find_declaration(config)
    stored = catalogue.pipelines.get(name)
    if stored is None:
        known = ", ".join(sorted(catalogue.pipelines)) or "none"
        raise CommandError(f'there is no pipeline "{name}" in the database; there are: {known}')
    declared = declaration.pipelines.get(name) if declaration else None
    chosen = replace(declared.upgrade if declared else UpgradeSettings(), **settings)
    create = CreatePipelineOp(name, str(stored.values["source"]), str(stored.values["content"]), **recipe)
    _require_change(create, stored)
    upgrade = planned_upgrade(DeclaredPipeline(create, chosen), stored, catalogue)
    return _with_model(upgrade, catalogue, declaration)


def _catalogue(config: Config) -> Catalogue:
    """Read the catalogue over the environment's own connection.

    Nothing is written.
    """
    found: list[Catalogue] = []

    def read(revision: Any, context: MigrationContext) -> list[Any]:
        connection = context.connection
        if connection is None or not is_installed(connection):
            raise CommandError(
                "embedline is not installed in the environment's database, or is older than its versions. "
                "HINT: EMBEDLINE_DSN=postgresql://... embedline upgrade, as a superuser."
            )
        found.append(read_catalogue(connection))
        return []

    scripts = ScriptDirectory.from_config(config)
    with EnvironmentContext(config, scripts, fn=read, dont_mutate=True):
        scripts.run_env()
    return found[-1]


def _require_change(create: CreatePipelineOp, stored: StoredPipeline) -> None:
    wanted = {name: value for name, value in create.written().items() if name in comparison.RECIPE}
    for version in stored.versions:
        if all(version[name] == value for name, value in wanted.items()):
            state = "serves" if version["serving"] else "is being filled"
            raise CommandError(f'version {version["number"]} of pipeline "{stored.name}" has this recipe, and {state}')


def _with_model(upgrade: Upgrade, catalogue: Catalogue, declaration: Declaration | None) -> Upgrade:
    model = upgrade.expand.model
    if model in catalogue.models:
        return upgrade
    if declaration is None or model not in declaration.models:
        raise CommandError(
            f'there is no model "{model}". HINT: As a superuser: SELECT embedline.create_model(...), or declare '
            f"[models.{model}] in embedline.toml, and the chain registers it."
        )
    return replace(upgrade, register=declaration.models[model])
