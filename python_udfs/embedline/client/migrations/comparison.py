"""Compare declared pipelines with those of the database."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alembic.util import CommandError
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from embedline.client.migrations.catalogue import (
    ADDRESS,
    Catalogue,
    StoredPipeline,
    is_configuration,
    is_installed,
    read_catalogue,
)
from embedline.client.migrations.chain import Upgrade
from embedline.client.migrations.declaration import Declaration, DeclaredPipeline
from embedline.client.migrations.operations import (
    AddEmbeddingVersionOp,
    AlterPipelineOp,
    CreateModelOp,
    CreatePipelineOp,
    DropModelOp,
    DropPipelineOp,
    PipelineOperation,
)
from embedline.client.migrations.statements import literal

logger = logging.getLogger("alembic.embedline")

# A change of one of these needs a new version. Index options are not among them, because an index is rebuilt beside the
# vectors.
RECIPE = (
    "model", "column_type", "distance", "chunking", "chunk_tokens", "chunk_overlap", "chunking_options",
)  # fmt: skip
# A change of one of these concerns the rows one by one: embedline.alter_pipeline.
ALTERABLE = ("content", "filter", "document_prefix", "tenant", "weight", "keyword", "caption", "changed_by")
# The options that embedline.alter_pipeline's drop can remove.
_OPTIONAL = ("filter", "document_prefix", "tenant", "keyword", "caption")
# The text of a table's name as SplitIdentifierString of varlena.c reads it. From PostgreSQL 16 on to_regclass returns NULL
# for any other text, as for a table that does not exist yet; before, it raises an error.
_NAME = r'(?:"(?:[^"]|"")*"|[^."\s][^.\s]*)'
_TABLE_NAME = re.compile(rf"\s*{_NAME}\s*(?:\.\s*{_NAME}\s*){{0,2}}", re.ASCII)


@dataclass(frozen=True)
class Changes:
    """The changes that bring the database to the declaration.

    Drops come before other changes of the schema, the rest after.
    """

    drops: tuple[PipelineOperation, ...] = ()
    operations: tuple[PipelineOperation, ...] = ()
    upgrades: tuple[Upgrade, ...] = ()


def compare(connection: Connection, declaration: Declaration) -> Changes:
    """Return the changes.

    Raises CommandError if the declaration asks for a change that no operation can do.
    """
    if not is_installed(connection):
        raise CommandError(
            f"{declaration.path} declares pipelines, but embedline is not installed in the database. "
            "HINT: EMBEDLINE_DSN=postgresql://... embedline upgrade, as a superuser."
        )
    catalogue = read_catalogue(connection)
    _log_undeclared(declaration, catalogue)
    operations: list[PipelineOperation] = list(_new_models(declaration, catalogue))
    upgrades: list[Upgrade] = []
    for name, declared in declaration.pipelines.items():
        _require_model(declaration, declared, catalogue)
        source_oid = _source_oid(connection, declaration, declared)
        stored = catalogue.pipelines.get(name)
        if stored is None:
            operations.append(declared.create)
            logger.info("Detected added pipeline %r", name)
            continue
        _require_same_source(source_oid, declared, stored)
        _require_same_contents(declared, stored)
        operations.extend(_alteration(declared, stored))
        upgrades.extend(_upgrade(declared, stored, catalogue))
    return Changes(tuple(_drops(declaration, catalogue)), tuple(operations), tuple(upgrades))


def _new_models(declaration: Declaration, catalogue: Catalogue) -> list[CreateModelOp]:
    """Return the unregistered models that a declared pipeline uses, and the rerankers.

    Others are not proposed: a contract forgets a model that is no longer used, though the file may keep it.
    """
    new = []
    used = {declared.create.model for declared in declaration.pipelines.values()}
    for name, declared in declaration.models.items():
        stored = catalogue.models.get(name)
        if stored is None and name not in used and declared.task != "rerank":
            logger.info("model %r is registered when a pipeline asks for it", name)
            continue
        if stored is None:
            new.append(declared)
            logger.info("Detected added model %r", name)
            continue
        for key, value in declared.written().items():
            if key != "price_per_million_tokens" and not _same(stored.get(key), value):
                raise CommandError(
                    f'{declaration.path}: model "{name}" is registered with another {key}: {stored.get(key)!r}. '
                    f"HINT: A registered model stays what it is: declare the changed one under a name of its own and "
                    "let the pipeline name that. If only its endpoint or limits changed, run embedline.alter_model first."
                )
    return new


def _drops(declaration: Declaration, catalogue: Catalogue) -> list[PipelineOperation]:
    drops: list[PipelineOperation] = []
    for name in declaration.drop_pipelines:
        if name in catalogue.pipelines:
            logger.info("Detected pipeline %r to be dropped", name)
            drops.append(DropPipelineOp(name, recreation(catalogue.pipelines[name])))
    for name in declaration.drop_models:
        if name in catalogue.models:
            logger.info("Detected model %r to be dropped", name)
            drops.append(DropModelOp(name, _registration(name, catalogue.models[name])))
    return drops


def _log_undeclared(declaration: Declaration, catalogue: Catalogue) -> None:
    for name in sorted(set(catalogue.pipelines) - set(declaration.pipelines) - set(declaration.drop_pipelines)):
        logger.info(
            "pipeline %r is not in %s: left alone; drop.pipelines lists those to be dropped", name, declaration.path
        )


def recreation(stored: StoredPipeline) -> CreatePipelineOp:
    """Return the operation that creates the pipeline with its present values."""
    serving, values = stored.serving, stored.values
    recipe = {name: serving[name] for name in (*RECIPE, "index_method", "index_options") if name != "model"}
    return CreatePipelineOp(
        stored.name, values["source"], values["content"], serving["model"],
        **{name: values[name] for name in (*ALTERABLE, "capture") if name != "content"},
        **({} if values["modality"] == "text" else {"modality": values["modality"]}),
        **{name: value for name, value in recipe.items() if value != {}},
    )  # fmt: skip


def _registration(name: str, stored: Mapping[str, Any]) -> CreateModelOp:
    given = {
        key: value
        for key, value in stored.items()
        if key in CreateModelOp.__dataclass_fields__ and key != "name" and value not in (None, "", {})
    }
    return CreateModelOp(name=name, **given)


def _require_model(declaration: Declaration, declared: DeclaredPipeline, catalogue: Catalogue) -> None:
    model = declared.create.model
    if model not in declaration.models and model not in catalogue.models:
        raise CommandError(
            f'{declaration.path}: pipeline "{declared.create.name}" names model "{model}", which is neither registered nor '
            f"declared. HINT: Declare it as [models.{model}]; SELECT name FROM embedline.model lists those registered."
        )


def _source_oid(connection: Connection, declaration: Declaration, declared: DeclaredPipeline) -> int | None:
    """Return the source's oid, None if there is no such table yet."""
    source = declared.create.source
    refusal = CommandError(
        f"{declaration.path}: [pipelines.{declared.create.name}] source {source!r} is no name of a table. "
        'HINT: Write schema.table, and in double quotes what is not lower case: public."My table".'
    )
    if not _TABLE_NAME.fullmatch(source):
        raise refusal
    try:
        found: int | None = connection.exec_driver_sql(
            f"SELECT to_regclass({literal(source)})::oid::bigint", execution_options={"no_parameters": True}
        ).scalar()
    except DBAPIError as error:  # another database's table
        raise refusal from error
    return found


def _require_same_source(found: int | None, declared: DeclaredPipeline, stored: StoredPipeline) -> None:
    source = declared.create.source
    # None if the table comes with this revision, or was renamed in the models first.
    if found is not None and found != stored.values["source_oid"]:
        raise CommandError(
            f'pipeline "{stored.name}" watches {stored.values["source"]}, not {source}. '
            f"HINT: A revision with op.move_pipeline({stored.name!r}, {source!r}) goes over to another table of the same key; "
            "or declare a pipeline of another name, and list this one in drop.pipelines when it is no longer needed."
        )


def _require_same_contents(declared: DeclaredPipeline, stored: StoredPipeline) -> None:
    """Raise CommandError if the rows would hold another kind of content.

    A modality that the declaration leaves out may be any.
    """
    is_reference = stored.values["is_reference"]
    if declared.create.modality not in (None, stored.values["modality"]):
        difference = f"has modality {stored.values['modality']}, not {declared.create.modality}"
    elif is_reference and declared.create.changed_by is None:
        difference = "holds addresses of files, and its declaration has no changed_by"
    elif declared.create.changed_by is not None and not is_reference:
        difference = "holds no addresses of files, and its declaration has changed_by"
    else:
        return
    raise CommandError(
        f'pipeline "{stored.name}" {difference}. HINT: A pipeline keeps to its kind of contents: '
        "declare one of another name, and list this one in drop.pipelines when it is no longer needed."
    )


def _alteration(declared: DeclaredPipeline, stored: StoredPipeline) -> list[AlterPipelineOp]:
    changed: dict[str, Any] = {}
    before: dict[str, Any] = {}
    for name, value in declared.create.written().items():
        if name in ALTERABLE and not _is_as_declared(stored, name, value):
            changed[name], before[name] = value, stored.values[name]
    if stored.values["is_reference"] and not changed.keys().isdisjoint(ADDRESS):
        changed |= {name: getattr(declared.create, name) for name in ADDRESS}
        before |= {name: stored.values[name] for name in ADDRESS}
    # An optional expression that the file no longer has must be dropped; content cannot be.
    drop = tuple(
        name for name in _OPTIONAL if getattr(declared.create, name) is None and stored.values[name] is not None
    )
    before |= {name: stored.values[name] for name in drop}
    if not before:
        return []
    logger.info("Detected changed %s of pipeline %r", ", ".join(before), stored.name)
    return [AlterPipelineOp(stored.name, **changed, drop=drop, before=before)]


def _is_as_declared(stored: StoredPipeline, name: str, value: Any) -> bool:
    if name == "keyword":
        return is_configuration(value, stored.values["keyword_names"])
    return _same(stored.values[name], value)


def _upgrade(declared: DeclaredPipeline, stored: StoredPipeline, catalogue: Catalogue) -> list[Upgrade]:
    wanted = {name: value for name, value in declared.create.written().items() if name in RECIPE}
    if _has(stored.serving, wanted):
        return []
    for version in stored.versions:
        if _has(version, wanted):
            logger.info(
                "version %s of pipeline %r is what is declared and does not serve yet", version["number"], stored.name
            )
            return []
    changed = ", ".join(name for name, value in wanted.items() if not _same(stored.serving[name], value))
    logger.info("Detected changed %s of pipeline %r: version %s", changed, stored.name, stored.next_number)
    return [planned_upgrade(declared, stored, catalogue)]


def planned_upgrade(declared: DeclaredPipeline, stored: StoredPipeline, catalogue: Catalogue) -> Upgrade:
    """Return the upgrade of a pipeline to its declaration."""
    settings = declared.upgrade
    given = {
        name: value
        for name, value in declared.create.written().items()
        if name in (*RECIPE, "index_method", "index_options")
        and (name == "model" or not _same(stored.serving[name], value))
    }
    expand = AddEmbeddingVersionOp(
        stored.name, stored.next_number, **given,
        backfill_order=settings.backfill_order, backfill_rate=settings.backfill_rate,
    )  # fmt: skip
    serving_model = str(stored.serving["model"])
    registration = _registration(serving_model, catalogue.models[serving_model])
    return Upgrade(expand, int(stored.serving["number"]), serving_model, settings, serving_registration=registration)


def _has(version: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(_same(version[name], value) for name, value in wanted.items())


def _same(stored: Any, declared: Any) -> bool:
    """Return True if values are equal; 95 and 95.0 are."""
    return bool(stored == (dict(declared) if isinstance(declared, Mapping) else declared))
