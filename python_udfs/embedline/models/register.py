"""Register models: those that embed, and rerankers."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from embedline.catalog.load import load_allowed_endpoints
from embedline.catalog.rights import require_superuser
from embedline.core.embedding import ModelConfig, ModelInfo
from embedline.core.prices import check_price
from embedline.core.recipe import ModelSpec, RequestLimits
from embedline.embedders import check_task, create_embedder, known_options
from embedline.errors import AlreadyExists, DimensionMismatch, InvalidParameter, NotFound
from embedline.models.pool import let_cancel_through, wait_result
from embedline.models.query_embedding import warm_up
from embedline.models.reranking import probe_reranker
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.providers.options import check_options

_KEY_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*\Z")
# Names of query parameters that hold secrets; api-version and the like do not.
_SECRET_PARAMETER = re.compile(r"key|token|secret|passw|signature|credential|\Asig\Z|\Acode\Z|auth", re.IGNORECASE)
_LIMITS = {
    "max_batch_items": (1, 100_000),
    "max_batch_tokens": (1, 10_000_000),
    "concurrency": (1, 256),
}
INSERT_MODEL = """
    INSERT INTO embedline.model (name, provider, model, revision, dimensions, max_tokens, tokenizer, base_url,
        api_key_env, document_prefix, query_prefix, max_batch_items, max_batch_tokens, concurrency, timeout_seconds,
        options, fingerprint, price_per_million_tokens, learned, task, modalities)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21)
"""
INSERT_TYPES = (
    ["text"] * 4
    + ["integer"] * 2
    + ["text"] * 5
    + ["integer"] * 3
    + ["double precision", "jsonb", "text", "numeric", "jsonb", "text", "text[]"]
)


@entry_point
def create_model(session: Session, parameters: dict[str, Any]) -> str:
    """Probe a model, store what it is, return its name.

    Raises if the declaration does not fit the model.
    """
    spec = ModelSpec.from_parameters(parameters)
    price = check_price(spec.price)
    config = _validated_config(session, spec)
    if session.scalar("SELECT model_id FROM embedline.model WHERE name = $1", ["text"], config.name) is not None:
        raise AlreadyExists(
            f'there is a model "{config.name}" already',
            hint=f"SELECT embedline.drop_model('{config.name}') removes it if no pipeline uses it.",
        )
    info = probe(session, config)
    if config.dimensions is not None and info.dimensions != config.dimensions:
        raise DimensionMismatch(
            f'model "{config.model}" returns {info.dimensions} dimensions, not {config.dimensions}',
            hint=f"Leave dimensions out, or declare dimensions => {info.dimensions}.",
        )
    max_tokens = config.options.get("max_tokens", info.max_tokens)
    tokenizer = Path(info.tokenizer_path).read_text(encoding="utf-8") if info.tokenizer_path else None
    session.query(
        INSERT_MODEL,
        INSERT_TYPES,
        config.name, config.provider, config.model, config.revision, info.dimensions or None, max_tokens, tokenizer,
        config.base_url, config.api_key_env, config.document_prefix, config.query_prefix, config.max_batch_items,
        config.max_batch_tokens, config.concurrency, config.timeout_seconds, json.dumps(dict(config.options)),
        info.fingerprint, price, json.dumps(dict(info.learned)), config.task,
        list(info.modalities),
    )  # fmt: skip
    warm_up(session, config.provider)
    return config.name


@entry_point
def drop_model(session: Session, name: str) -> None:
    """Forget a model that no pipeline uses."""
    users = session.query(
        """
        SELECT DISTINCT p.name FROM embedline.version AS v
        JOIN embedline.model AS m ON m.model_id = v.model_id
        JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
        WHERE m.name = $1 ORDER BY p.name
        """,
        ["text"],
        name,
    )
    if users:
        names = ", ".join(str(row["name"]) for row in users)
        raise InvalidParameter(
            f'model "{name}" is in use',
            detail=f"Pipelines: {names}.",
            hint=f"SELECT embedline.drop_pipeline('{users[0]['name']}') first.",
        )
    if session.scalar("DELETE FROM embedline.model WHERE name = $1 RETURNING model_id", ["text"], name) is None:
        raise NotFound(f'there is no model "{name}"', hint="SELECT name FROM embedline.model lists the models.")


def probe(session: Session, config: ModelConfig) -> ModelInfo:
    """Ask the model for its dimensions and limits; the statement can be cancelled.

    A reranker scores a few pairs.
    """
    if config.task == "rerank":
        return probe_reranker(session, config)
    embedder = create_embedder(config)
    try:
        return wait_result(embedder.probe(), let_cancel_through(session))
    finally:
        embedder.close()


def checked_options(name: str, provider: str, given: str | None) -> dict[str, Any]:
    """Return a model's options if its provider knows them.

    They come as the text of a jsonb value.
    """
    loaded = json.loads(given or "{}")
    if not isinstance(loaded, dict):
        raise InvalidParameter(
            f'the options of model "{name}" must be an object', hint="For example options => '{\"max_tokens\": 512}'."
        )
    if (known := known_options(provider)) is not None:
        check_options(name, loaded, known)
    return loaded


def _refuse_secrets(base_url: str | None) -> None:
    """Raise InvalidParameter if an address carries a credential.

    Readers see the address.
    """
    try:
        parts = urlsplit(base_url or "")
        names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    except ValueError:
        raise InvalidParameter("base_url is not an address", hint="For example http://127.0.0.1:11434/v1.") from None
    if "@" in parts.netloc or any(_SECRET_PARAMETER.search(name) for name in names):
        raise InvalidParameter(
            "base_url must not hold a user, a password or a key",
            detail="The address is not shown here, but every role that may search can read it in embedline.model.",
            hint="Start the server with the key in a variable and pass api_key_env => 'ITS_NAME'; a header of another name"
            ' than Authorization is options => \'{"key_header": "api-key"}\'.',
        )


def check_limits(limits: RequestLimits) -> None:
    """Raise for a limit of requests that cannot be used; one that is not given passes."""
    given = limits.given()
    for name, (low, high) in _LIMITS.items():
        if name in given and not low <= given[name] <= high:
            raise InvalidParameter(f"{name} must be between {low} and {high}, not {given[name]}")
    if limits.timeout_seconds is not None and not limits.timeout_seconds > 0:
        raise InvalidParameter("timeout_seconds must be above 0")


def check_endpoint(base_url: str | None, api_key_env: str | None) -> None:
    """Raise unless the address is one without a secret and the key is a variable."""
    if base_url is not None and not re.match(r"https?://[^/\s]", base_url):
        raise InvalidParameter(
            "base_url must begin with http:// or https://", hint="For example http://127.0.0.1:11434/v1."
        )
    _refuse_secrets(base_url)
    if api_key_env is not None and not _KEY_VARIABLE.match(api_key_env):
        raise InvalidParameter(
            "api_key_env must be the name of an environment variable of the server",
            detail="The given value is not shown, because it may be the key itself.",
            hint="Start the server with OPENAI_API_KEY set and pass api_key_env => 'OPENAI_API_KEY'.",
        )


def check_directory(provider: str, model: str) -> None:
    """Raise InvalidParameter if a local model's directory is not there."""
    if provider == "sentence-transformers" and os.path.isabs(model) and not os.path.isdir(model):
        raise InvalidParameter(
            f'there is no model directory "{model}" that the server can read',
            hint="Give a directory on the server that its operating system user can read, or a hub name.",
        )


def _validated_config(session: Session, spec: ModelSpec) -> ModelConfig:
    check_task(spec.provider, spec.task)
    if spec.task == "rerank" and spec.dimensions is not None:
        raise InvalidParameter("a reranker has no dimensions", hint="Leave dimensions out.")
    for required, value in (("name", spec.name), ("provider", spec.provider), ("model", spec.model)):
        if not value:
            raise InvalidParameter(f"{required} must not be empty")
    check_limits(spec.limits)
    if spec.dimensions is not None and not 1 <= spec.dimensions <= 16_000:
        raise InvalidParameter("dimensions must be between 1 and 16000: pgvector stores no longer vector")
    hint = f"As a superuser, run embedline.create_model('{spec.name}', ...); any embedline_admin may then use it."
    require_superuser(session, "register a model", hint)
    check_endpoint(spec.base_url, spec.api_key_env)
    options = checked_options(spec.name, spec.provider, spec.options)
    check_directory(spec.provider, spec.model)
    return ModelConfig(
        name=spec.name, provider=spec.provider, model=spec.model, dimensions=spec.dimensions, revision=spec.revision,
        base_url=spec.base_url, api_key_env=spec.api_key_env, document_prefix=spec.document_prefix,
        query_prefix=spec.query_prefix, options=options, task="rerank" if spec.task == "rerank" else "embed",
        allowed_endpoints=load_allowed_endpoints(session), **asdict(spec.limits),
    )  # fmt: skip
