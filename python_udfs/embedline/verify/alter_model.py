"""Alter a registered model without changing its vectors.

Its endpoint, key, limits, and the options that do not decide vectors can be altered. The stored vectors stay, so an
endpoint is accepted only if it gives them again. The new endpoint embeds a sample of stored chunks, which is compared
by cosine, with the bound that `verify` uses each night.

With a lower bound a server in int8 would pass. Its vectors of MiniLM had a median of 0.9915 and went down to 0.9794
(300 paragraphs). But an endpoint that puts a prefix before each text would pass, too: its median was 0.9840.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from embedline.catalog.load import load_model, load_pipeline, load_versions
from embedline.catalog.rights import require_superuser
from embedline.catalog.values import Model, Pipeline
from embedline.core import vectors
from embedline.core.embedding import Embedder, ModelConfig, ModelInfo
from embedline.core.prices import check_price
from embedline.core.recipe import ModelChanges
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.documents.files import stored_inputs
from embedline.embedders import create_embedder
from embedline.errors import DimensionMismatch, InvalidParameter, NotReady
from embedline.models.document_embedding import embed_texts, lowest_cosine
from embedline.models.pool import let_cancel_through, wait_result
from embedline.models.register import check_directory, check_endpoint, check_limits, checked_options, probe
from embedline.pipelines import published
from embedline.pipelines.register import version_fingerprint
from embedline.pipelines.state import load_alone
from embedline.postgres.claims import CALLERS_TRANSACTION
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import bound_lock_wait
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session
from embedline.spending import ledger

# Stored chunks that are embedded again. If one in 30 came back different, 100 would all be the same in 3 % of tries.
_SAMPLE = 100
# Share by which lengths of vectors that are not normalised may differ. A cosine does not see the length.
_LENGTH_TOLERANCE = 0.01
# Options that decide vectors or their texts. Each is part of a recipe, so another value is another model.
_DECISIVE_OPTIONS = (
    "tokenizer", "send_dimensions", "extra_body", "document_body", "query_body", "backend", "precision",
)  # fmt: skip
_LIMITS = ("concurrency", "max_batch_items", "max_batch_tokens", "timeout_seconds")

# Alterations of one model follow each other. NO KEY, so that creating a pipeline with the model does not wait.
_LOCK = "SELECT price_per_million_tokens FROM embedline.model WHERE model_id = $1 FOR NO KEY UPDATE"
_USERS = """
    SELECT DISTINCT p.name FROM embedline.version AS v JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
    WHERE v.model_id = $1 ORDER BY p.name
"""
# Waits for the workers that write into these versions, and blocks new ones; see VersionWork.write.
_HOLD = "SELECT 1 FROM embedline.version WHERE model_id = $1 ORDER BY version_id FOR UPDATE"
_STORE = """
    UPDATE embedline.model SET model = $2, base_url = $3, api_key_env = $4, max_batch_items = $5, max_batch_tokens = $6,
        concurrency = $7, timeout_seconds = $8, options = $9, price_per_million_tokens = $10, max_tokens = $11
    WHERE model_id = $1
"""
_STORE_TYPES = [
    "bigint", "text", "text", "text", "integer", "integer", "integer", "double precision", "jsonb", "numeric", "integer",
]  # fmt: skip
_STORE_PROBED = """
    UPDATE embedline.model SET fingerprint = $2, probed_fingerprint = nullif($3, $2), learned = $4, modalities = $5
    WHERE model_id = $1
"""
# Found through the primary key, so that the cost is the same on any table. model_drift does the same with the keys.
_CHOOSE = """
    WITH target AS MATERIALIZED (
        SELECT b.low + floor(random() * (b.high - b.low + 1))::bigint AS chunk_id
        FROM (SELECT min(chunk_id) AS low, max(chunk_id) AS high FROM {vectors}) AS b CROSS JOIN generate_series(1, $1)
    ), picked AS MATERIALIZED (
        SELECT DISTINCT p.chunk_id FROM target AS t CROSS JOIN LATERAL (
            SELECT v.chunk_id FROM {vectors} AS v WHERE v.chunk_id >= t.chunk_id ORDER BY v.chunk_id LIMIT 1
        ) AS p
    )
    SELECT c.chunk_id, coalesce(c.prefix, '') AS prefix, c.content, {send}(v.{column}) AS vector
    FROM picked AS p JOIN {vectors} AS v ON v.chunk_id = p.chunk_id JOIN {chunk} AS c ON c.chunk_id = p.chunk_id
"""


@dataclass(frozen=True)
class _Compared:
    """A stored chunk compared with its vector of the new endpoint."""

    pipeline: str
    chunk_id: int
    cosine: float
    is_same: bool


@entry_point
def alter_model(session: Session, name: str, parameters: dict[str, Any]) -> None:
    """Change the given parameters of a model; NULL keeps.

    Nothing is changed unless the new endpoint gives the stored vectors.

    Nothing is changed unless the new endpoint gives the stored vectors. Superusers only. Holds the model's row while
    the endpoint is asked; no worker and no search waits for that lock.
    """
    require_superuser(session, "alter a model", f"As a superuser, run embedline.alter_model('{name}', ...).")
    changes = ModelChanges.from_parameters(parameters)
    price = check_price(changes.price)
    check_limits(changes.limits)
    model = load_model(session, name)
    stored_price = session.scalar(_LOCK, ["bigint"], model.model_id)
    # Loaded again, because another alteration may have ended while this one waited.
    model = load_model(session, name)
    config = _wanted(model, changes)
    price = stored_price if price is None else price
    if config == model.config and price == stored_price:
        session.plpy.notice(f'model "{name}" is like that already: nothing has changed')
        return
    if not _differ_only(model.config, config, _LIMITS):
        _ask_endpoint(session, model, config)
    session.query(
        _STORE, _STORE_TYPES, model.model_id, config.model, config.base_url, config.api_key_env, config.max_batch_items,
        config.max_batch_tokens, config.concurrency, config.timeout_seconds, json.dumps(dict(config.options)), price,
        config.options.get("max_tokens", model.max_tokens),
    )  # fmt: skip
    for row in session.query(_USERS, ["bigint"], model.model_id):
        # Readers of subscribers choose their model by these rows.
        published.write_routing(session, load_pipeline(session, str(row["name"])))


def _differ_only(before: ModelConfig, after: ModelConfig, fields: Sequence[str]) -> bool:
    """Return True if the configs are the same except for these fields."""
    return replace(before, **{field: getattr(after, field) for field in fields}) == after


def _wanted(model: Model, changes: ModelChanges) -> ModelConfig:
    """Return the model's config with the changes.

    An empty text takes an address or a key's variable away.
    """
    changed: dict[str, Any] = dict(changes.limits.given())
    if changes.base_url is not None:
        changed["base_url"] = changes.base_url or None
    if changes.api_key_env is not None:
        changed["api_key_env"] = changes.api_key_env or None
    if changes.model is not None:
        changed["model"] = changes.model
    if changes.options is not None:
        changed["options"] = _wanted_options(model, changes.options)
    wanted = replace(model.config, **changed)
    if not wanted.model:
        raise InvalidParameter("model must not be empty")
    check_endpoint(wanted.base_url, wanted.api_key_env)
    check_directory(wanted.provider, wanted.model)
    return wanted


def _wanted_options(model: Model, given: str) -> dict[str, Any]:
    """Return the model's options with those given; null takes one away."""
    config = model.config
    changes = checked_options(config.name, config.provider, given)
    for option in _DECISIVE_OPTIONS if config.task == "embed" else ():
        before, after = (_decisive_value(option, options.get(option)) for options in (config.options, changes))
        if option in changes and before != after:
            raise InvalidParameter(
                f'option "{option}" of model "{config.name}" decides its vectors and cannot be altered',
                hint=_other_way(config.name, None),
            )
    return {option: value for option, value in {**config.options, **changes}.items() if value is not None}


def _decisive_value(option: str, value: object) -> object:
    """Return a value; a precision that is left open is that of float32."""
    return "float32" if option == "precision" and value in (None, "auto") else value


def _ask_endpoint(session: Session, model: Model, config: ModelConfig) -> None:
    """Probe the new endpoint, compare its vectors with those stored, note it.

    Raises if it cannot take the place of the old one.
    """
    if config.task == "rerank":
        # No score is stored, so nothing has to be compared.
        info = probe(session, config)
        _store_probed(session, model, info.fingerprint, info)
        return
    # What the endpoint before was like says nothing about this one.
    embedder = create_embedder(replace(config, learned={}))
    try:
        info = wait_result(embedder.probe(), let_cancel_through(session))
        fingerprint = model.fingerprint
        # Not for a new key, which names an account: used-up budgets must not keep an old key in place.
        if not _differ_only(model.config, config, (*_LIMITS, "api_key_env")):
            fingerprint = _checked_fingerprint(session, replace(model, config=config), info, embedder)
    except DimensionMismatch as error:
        message = f'the new endpoint of model "{config.name}" returns vectors of another dimension'
        raise DimensionMismatch(message, detail=error.detail, hint=_other_way(config.name, None)) from None
    finally:
        embedder.close()
    _store_probed(session, model, fingerprint, info)


def _store_probed(session: Session, model: Model, fingerprint: str, info: ModelInfo) -> None:
    session.query(
        _STORE_PROBED,
        ["bigint", "text", "text", "jsonb", "text[]"],
        model.model_id,
        fingerprint,
        info.fingerprint,
        json.dumps(dict(info.learned)),
        list(info.modalities),
    )
    # The failures that opened it were those of the earlier endpoint.
    session.query("DELETE FROM embedline.circuit WHERE model_id = $1", ["bigint"], model.model_id)


def _checked_fingerprint(session: Session, model: Model, info: ModelInfo, embedder: Embedder) -> str:
    """Return the fingerprint of the model behind its new endpoint.

    It is the stored one if the endpoint gives the stored vectors.
    """
    versions = _versions(session, model)
    _require_same_towers(model, info, versions)
    compared = _compare(session, versions, embedder)
    if not compared and versions:
        # A worker may be about to write the first vectors, made by the earlier endpoint.
        bound_lock_wait(session)
        for name in dict.fromkeys(pipeline.name for pipeline in versions):
            load_alone(session, name, holds_source=False)
        session.query(_HOLD, ["bigint"], model.model_id)
        versions = _versions(session, model)
        compared = _compare(session, versions, embedder)
    if not compared:
        _take_fingerprint(session, versions, info.fingerprint)
        session.plpy.notice(
            f'model "{model.config.name}": no vectors are stored yet, so the new endpoint was only probed'
        )
        return info.fingerprint
    different = [chunk for chunk in compared if not chunk.is_same]
    cosines = sorted(chunk.cosine for chunk in compared)
    figures = f"lowest cosine {cosines[0]:.4f}, median {cosines[len(cosines) // 2]:.4f}"
    if different:
        worst = min(different, key=lambda chunk: chunk.cosine)
        raise InvalidParameter(
            f'the new endpoint of model "{model.config.name}" gives other vectors than those stored',
            detail=f"{len(different)} of {len(compared)} stored chunks came back otherwise: {figures}, where"
            f" {lowest_cosine(model.config)} is needed; for example chunk {worst.chunk_id} of pipeline"
            f' "{worst.pipeline}".',
            hint=_other_way(model.config.name, worst.pipeline),
        )
    session.plpy.notice(f'model "{model.config.name}": {len(compared)} stored chunks came back the same: {figures}')
    return model.fingerprint


def _require_same_towers(model: Model, info: ModelInfo, versions: Sequence[Pipeline]) -> None:
    """Raise InvalidParameter if a model of towers in use would get another tower.

    The stored vectors are those of one tower. Another tower of texts would be asked beside them, and nothing would tell.
    """
    is_local = model.config.provider == "sentence-transformers"
    is_other = set(info.modalities) != set(model.modalities) or (is_local and info.fingerprint != model.fingerprint)
    if versions and model.has_towers and is_other:
        raise InvalidParameter(
            f'model "{model.config.name}" would have other towers than those of the stored vectors',
            detail="Towers belong together: none can be changed alone.",
            hint=_other_way(model.config.name, versions[0].name),
        )


def _versions(session: Session, model: Model) -> list[Pipeline]:
    """Return all versions that the model embeds, each with the altered model."""
    names = [str(row["name"]) for row in session.query(_USERS, ["bigint"], model.model_id)]
    return [
        replace(pipeline, version=replace(pipeline.version, model=model))
        for name in names
        for pipeline in load_versions(session, name)
        if pipeline.version.model.model_id == model.model_id
    ]


def _compare(session: Session, versions: list[Pipeline], embedder: Embedder) -> list[_Compared]:
    """Embed a sample of the versions' chunks with the new endpoint, and compare.

    Returns none if no vector is stored.
    """
    found: list[_Compared] = []
    for pipeline in random.sample(versions, len(versions)):
        if len(found) < _SAMPLE:
            found += _compare_version(session, pipeline, embedder, max(1, _SAMPLE // len(versions)))
    return found


def _compare_version(session: Session, pipeline: Pipeline, embedder: Embedder, sample: int) -> list[_Compared]:
    version, name = pipeline.version, pipeline.version.model.config.name
    query = _CHOOSE.format(
        vectors=pipeline.vectors,
        chunk=pipeline.chunk,
        column=quote_ident(version.column),
        send=f"{vector_schema(session)}.{version.column_type}_send",
    )
    rows = session.query(query, ["integer"], sample)
    if not rows:
        return []
    found = stored_inputs(session, pipeline, rows)
    if not found:
        return []
    rows, texts = [dict(row) for row, _ in found], [given for _, given in found]
    # A token has about four characters; two are on the safe side.
    grant = ledger.reserve(session, pipeline, [1 + sum(map(len, texts)) // 2], CALLERS_TRANSACTION)
    if not grant.count:
        raise NotReady(
            f'model "{name}" may not be asked now: {grant.reason}',
            hint="SELECT * FROM embedline.budget; shows the budgets; embedline.set_budget raises one.",
        )
    fresh = embed_texts(session, pipeline, embedder, texts)
    if grant.reservation_id is not None:
        ledger.settle(session, grant.reservation_id, None)
    stored = vectors.vectors_from_send([row["vector"] for row in rows], version.column_type)
    lengths = np.linalg.norm(stored, axis=1), np.linalg.norm(fresh, axis=1)
    # A stored vector without a direction is a finding of verify.
    sound = np.flatnonzero(lengths[0] > 0)
    cosines = np.einsum("ij,ij->i", stored, fresh, dtype=np.float64) / np.maximum(lengths[0] * lengths[1], 1e-30)
    is_same = cosines >= lowest_cosine(version.model.config)
    if version.distance == "l2":
        is_same &= np.abs(lengths[1] - lengths[0]) <= _LENGTH_TOLERANCE * lengths[0]
    return [_Compared(pipeline.name, rows[i]["chunk_id"], float(cosines[i]), bool(is_same[i])) for i in sound]


def _take_fingerprint(session: Session, versions: list[Pipeline], fingerprint: str) -> None:
    """Give versions without vectors the fingerprint of their new endpoint.

    Rows in flight for them are dropped.

    The versions are this transaction's alone. A worker that comes with vectors of the earlier endpoint finds another
    generation, or another fingerprint, and its rows are embedded again.
    """
    for pipeline in versions:
        version = pipeline.version
        recipe = version_fingerprint(
            replace(version.model, fingerprint=fingerprint),
            version.column_type,
            version.distance,
            pipeline.spec,
            pipeline.document_prefix,
        )
        session.query(
            "UPDATE embedline.version SET fingerprint = $2 WHERE version_id = $1",
            ["bigint", "text"],
            version.version_id,
            recipe,
        )
        session.query(
            "UPDATE embedline.pipeline SET generation = generation + 1 WHERE pipeline_id = $1",
            ["bigint"],
            pipeline.pipeline_id,
        )


def _other_way(name: str, pipeline: str | None) -> str:
    """Return the statements for a model that gives other vectors."""
    of = quote_literal(pipeline).strip() if pipeline else "pipeline"
    new = quote_literal(f"{name}_2").strip()
    return (
        f"It is another model: SELECT embedline.create_model({new}, ...); then"
        f" SELECT embedline.add_embedding_version({of}, {new}); fills a version beside the stored one"
        " (docs/how-to/upgrade-a-model.md)."
    )
