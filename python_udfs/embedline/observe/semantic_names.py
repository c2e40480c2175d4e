"""Name spans, metrics and attributes as OpenTelemetry's conventions do.

The tables are our own, because the packages lag behind. GenAI: semantic-conventions-genai of 2026, client embeddings.
Database: semantic-conventions 1.44. An attribute that is not in these tables is not exported, so no text, key or vector is.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

Value = str | int
Attributes = Mapping[str, object]

EMBED = "embed"
# Stages that are statements of the database.
_DATABASE_STAGES = ("claim", "read", "write")
# Attributes of the hook by their names here.
_NAMES = {
    "pipeline": "embedline.pipeline",
    "version": "embedline.version",
    "model": "gen_ai.request.model",
    "provider": "gen_ai.provider.name",
    "dimensions": "gen_ai.embeddings.dimension.count",
    "tokens": "gen_ai.usage.input_tokens",
    "texts": "embedline.request.texts",
    "rows": "db.operation.batch.size",
    "error": "error.type",
}
# The attributes of requests that metrics have, too: few values each.
_MEASURED = (
    *("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model"),
    *("server.address", "server.port", "error.type"),
)
DURATION = "gen_ai.client.embeddings.duration"
INPUT_TOKENS = "gen_ai.client.embeddings.operation.input_tokens"
# Buckets that the conventions give.
DURATION_BUCKETS = tuple(0.01 * 2**power for power in range(14))
TOKEN_BUCKETS = tuple(4**power for power in range(14))
_PORTS = {"http": 80, "https": 443}


def span_name(name: str, attributes: Attributes) -> str:
    """Return the name of a span."""
    return f"embeddings {attributes.get('model')}" if name == EMBED and is_request(attributes) else f"embedline {name}"


def is_request(attributes: Attributes) -> bool:
    """Return True if the span is a request to a model."""
    return "provider" in attributes


def span_attributes(name: str, attributes: Attributes, namespace: str) -> dict[str, Value]:
    """Return the attributes of a span; `namespace` is the database's name."""
    found = {
        exported: value
        for given, exported in _NAMES.items()
        if isinstance(value := attributes.get(given), str | int) and (given != "rows" or not is_request(attributes))
    }
    if is_request(attributes):
        found["gen_ai.operation.name"] = "embeddings"
        found |= _server(attributes.get("address"))
    else:
        found.pop("gen_ai.request.model", None)
    if name in _DATABASE_STAGES:
        found |= {"db.system.name": "postgresql", "db.namespace": namespace}
        if "sqlstate" in attributes:
            found["db.response.status_code"] = str(attributes["sqlstate"])
    return found


def measured_attributes(attributes: Mapping[str, Value]) -> dict[str, Value]:
    """Return those attributes of a request's span that its metrics have."""
    return {name: attributes[name] for name in _MEASURED if name in attributes}


def _server(address: object) -> dict[str, Value]:
    if not isinstance(address, str):
        return {}
    # The path may name a deployment, and a user's name or a password may stand before the host.
    url = urlsplit(address)
    if url.hostname is None:
        return {}
    try:
        port = url.port or _PORTS.get(url.scheme)
    except ValueError:
        port = None
    return {"server.address": url.hostname, **({} if port is None else {"server.port": port})}
