"""Read the TOML file that declares models, pipelines, upgrades and drops."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from alembic.config import Config
from alembic.util import CommandError

from embedline.client.migrations.operations import CreateModelOp, CreatePipelineOp, PipelineOperation

# Option of alembic.ini, or of [tool.alembic], that names the file; without it, this file beside the configuration.
OPTION = "embedline_pipelines"
DEFAULT_NAME = "embedline.toml"

# Types of TOML values for a field, by the name of the field's type, and the words for them.
_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a string"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "Options": ((dict,), "a table"),
}
_VALUES = {
    "column_type": ("vector", "halfvec"),
    "distance": ("cosine", "inner_product", "l2"),
    "index_method": ("hnsw", "ivfflat", "none"),
    "task": ("embed", "rerank"),
    "capture": ("auto", "statement", "row"),
    "backfill_order": ("oldest_first", "newest_first"),
}

Operation = TypeVar("Operation", bound=PipelineOperation)


@dataclass(frozen=True)
class UpgradeSettings:
    """The settings of a pipeline upgrade; table [pipelines.<name>.upgrade]."""

    backfill_order: str | None = None
    backfill_rate: int | None = None
    wait_seconds: float = 0
    canaries: str | None = None
    k: int | None = None
    margin: float | None = None
    query_count: int | None = None
    rollback_window: str | None = None


@dataclass(frozen=True)
class DeclaredPipeline:
    """One table [pipelines.<name>], as the operation that would create it."""

    create: CreatePipelineOp
    upgrade: UpgradeSettings


@dataclass(frozen=True)
class Declaration:
    """The content of the file.

    Pipelines and models that it does not name are left alone.
    """

    path: Path
    models: Mapping[str, CreateModelOp] = field(default_factory=dict)
    pipelines: Mapping[str, DeclaredPipeline] = field(default_factory=dict)
    drop_pipelines: tuple[str, ...] = ()
    drop_models: tuple[str, ...] = ()


def find_declaration(config: Config | None) -> Declaration | None:
    """Return the declaration of an Alembic environment, None if it has none."""
    if config is None:
        return None
    named = config.get_alembic_option(OPTION)
    if named:
        return read_declaration(_beside(config, str(named)))
    default = _beside(config, DEFAULT_NAME)
    return read_declaration(default) if default.is_file() else None


def _beside(config: Config, name: str) -> Path:
    configuration = config.config_file_name or getattr(config, "toml_file_name", None)
    folder = Path(configuration).resolve().parent if configuration else Path.cwd()
    return folder / name


def read_declaration(path: Path) -> Declaration:
    """Read and check the file; raise CommandError for its first fault."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"{OPTION} cannot be read: {error}") from error
    except ValueError as error:
        raise CommandError(f"{path} is not TOML: {error}") from error
    unknown = set(content) - {"models", "pipelines", "drop"}
    if unknown:
        raise CommandError(f'{path}: there is no table "{min(unknown)}"; use models, pipelines and drop')
    drop = _table(path, "drop", content.get("drop", {}))
    models = {
        name: _operation(path, f"models.{name}", CreateModelOp, name, table)
        for name, table in _table(path, "models", content.get("models", {})).items()
    }
    pipelines = {
        name: _pipeline(path, name, table)
        for name, table in _table(path, "pipelines", content.get("pipelines", {})).items()
    }
    declaration = Declaration(
        path, models, pipelines, _names(path, drop, "pipelines", pipelines), _names(path, drop, "models", models)
    )
    if set(drop) - {"pipelines", "models"}:
        raise CommandError(f"{path}: [drop] takes pipelines and models, each a list of names")
    return declaration


def _pipeline(path: Path, name: str, table: Any) -> DeclaredPipeline:
    label = f"pipelines.{name}"
    given = dict(_table(path, label, table))
    upgrade = _table(path, f"{label}.upgrade", given.pop("upgrade", {}))
    _check_keys(path, f"{label}.upgrade", UpgradeSettings, upgrade)
    return DeclaredPipeline(_operation(path, label, CreatePipelineOp, name, given), UpgradeSettings(**upgrade))


def _operation(path: Path, label: str, kind: Callable[..., Operation], name: str, table: Any) -> Operation:
    given = _table(path, label, table)
    _check_keys(path, label, kind, given, ("name",))
    return kind(name=name, **given)


def _check_keys(path: Path, label: str, kind: Any, given: Mapping[str, Any], filled: tuple[str, ...] = ()) -> None:
    known = [item for item in fields(kind) if item.name not in filled]
    unknown = sorted(set(given) - {item.name for item in known})
    if unknown:
        names = ", ".join(item.name for item in known)
        raise CommandError(f'{path}: [{label}] has no key "{unknown[0]}". HINT: It takes {names}.')
    types = {item.name: str(item.type).removesuffix(" | None") for item in known}
    for name, value in given.items():
        _check_value(path, label, name, value, types[name])
    for item in known:
        if item.default is MISSING and item.default_factory is MISSING and item.name not in given:
            raise CommandError(f"{path}: [{label}] needs {item.name}")


def _check_value(path: Path, label: str, name: str, value: Any, declared_type: str) -> None:
    """Raise CommandError unless the value fits the field's type and known values."""
    # Loads tokenizers, so it is imported only if a file declares something.
    from embedline.chunking.spec import METHODS_BY_MODALITY

    accepted, wanted = _TYPES[declared_type]
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise CommandError(f"{path}: [{label}] {name} is {value!r}. HINT: It must be {wanted}.")
    known = {**_VALUES, "chunking": tuple(dict.fromkeys(itertools.chain(*METHODS_BY_MODALITY.values())))}.get(name)
    if known is not None and value not in known:
        raise CommandError(f"{path}: [{label}] {name} is {value!r}. HINT: It must be one of {', '.join(known)}.")


def _table(path: Path, label: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CommandError(f"{path}: {label} must be a table")
    return value


def _names(path: Path, drop: Mapping[str, Any], kind: str, declared: Mapping[str, Any]) -> tuple[str, ...]:
    names = drop.get(kind, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CommandError(f"{path}: drop.{kind} must be a list of names")
    for name in names:
        if name in declared:
            raise CommandError(f'{path}: "{name}" is declared in [{kind}.{name}] and listed in drop.{kind}')
    return tuple(names)
