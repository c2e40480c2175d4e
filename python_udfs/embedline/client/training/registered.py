"""Read registered models and their trainings, and register a trained one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psycopg

from embedline.client.connection import Connection
from embedline.client.training.pairs import Pair
from embedline.client.training.trainer import Base
from embedline.errors import AlreadyExists, InvalidParameter, NotFound, NotPermitted, NotReady

_SUPERUSER = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"
_EXISTS = "SELECT EXISTS (SELECT FROM embedline.model WHERE name = %s)"
_BASE = """
    SELECT name, provider, task, model, revision, fingerprint, query_prefix, document_prefix
    FROM embedline.model WHERE name = %s
"""
_HAS_KEYWORDS = "SELECT keyword IS NOT NULL FROM embedline.pipeline WHERE name = %s"
_MODALITY = "SELECT modality FROM embedline.pipeline WHERE name = %s"
_SEES = "SELECT (pg_catalog.pg_stat_file(%s, true)).isdir"
# The new model is asked as its base is.
_REGISTER = """
    SELECT embedline.create_model(%s, 'sentence-transformers', %s, query_prefix => b.query_prefix,
        document_prefix => b.document_prefix, options => b.options, max_batch_items => b.max_batch_items,
        max_batch_tokens => b.max_batch_tokens, concurrency => b.concurrency, timeout_seconds => b.timeout_seconds)
    FROM embedline.model AS b WHERE b.name = %s
"""
_RECORD = "SELECT embedline._record_training(%s, %s, %s)"
_TRAINING = """
    SELECT t.model, t.base, t.base_model, t.base_fingerprint, t.pipeline, t.pairs_table, t.pairs_hash, t.parameters,
        t.seed, t.code_version, t.evidence, t.metrics, t.outcome, b.revision, coalesce(b.query_prefix, m.query_prefix),
        coalesce(b.document_prefix, m.document_prefix), t.training_id
    FROM embedline.training AS t JOIN embedline.model AS m USING (model_id)
    LEFT JOIN embedline.model AS b ON b.name = t.base AND b.model = t.base_model WHERE m.name = %s
"""
_PAIRS = """
    SELECT query, key, grade, source, at::text, is_held_out FROM embedline.training_pair WHERE training_id = %s ORDER BY position
"""


@dataclass(frozen=True)
class Training:
    """A row of embedline.training with its pairs; `held_out` marks those that measure."""

    model: str
    base: Base
    pipeline: str
    pairs_table: str
    pairs_hash: str
    parameters: dict[str, Any]
    seed: int
    code_version: str
    evidence: dict[str, Any]
    metrics: dict[str, Any]
    outcome: str
    pairs: list[Pair]
    held_out: list[bool]


def require_superuser(connection: Connection) -> None:
    """Raise NotPermitted unless the session may register a model."""
    row = connection.execute(_SUPERUSER).fetchone()
    if row is None or not row[0]:
        raise NotPermitted(
            "only a superuser may fine-tune, because the result becomes a registered model",
            hint="Connect as a superuser, on the server as the OS user postgres: --dsn postgresql:///mydb.",
        )


def require_free(connection: Connection, name: str, target: Path) -> None:
    """Raise AlreadyExists if there is a model of that name."""
    row = connection.execute(_EXISTS, (name,)).fetchone()
    if row is not None and row[0]:
        raise AlreadyExists(
            f'there is a model "{name}" already',
            hint=f"Choose another --name; SELECT embedline.drop_model('{name}') and removing {target} make room for it.",
        )


def read_base(connection: Connection, name: str) -> Base:
    """Return the model of that name, if it can be trained further."""
    row = connection.execute(_BASE, (name,)).fetchone()
    if row is None:
        raise NotFound(f'there is no model "{name}"', hint="SELECT name FROM embedline.model lists the models.")
    _, provider, task, model, revision, fingerprint, query_prefix, document_prefix = row
    if provider != "sentence-transformers" or task != "embed":
        raise InvalidParameter(
            f'model "{name}" is not trained here: it is {"a reranker" if task != "embed" else f"of provider {provider}"}',
            hint="Name a model of provider sentence-transformers that embeds: SELECT name FROM embedline.model"
            " WHERE provider = 'sentence-transformers' AND task = 'embed';",
        )
    base = Base(name, model, revision, fingerprint, query_prefix, document_prefix)
    base.require_trainable()
    return base


def require_texts(connection: Connection, pipeline: str) -> None:
    """Raise InvalidParameter if the pipeline's content is no text."""
    row = connection.execute(_MODALITY, (pipeline,)).fetchone()
    if row is not None and row[0] != "text":
        raise InvalidParameter(
            f'pipeline "{pipeline}" embeds files of kind {row[0]}, and only models of texts are trained',
            hint="SELECT name FROM embedline.pipeline WHERE modality = 'text'; lists the pipelines of texts.",
        )


def has_keywords(connection: Connection, pipeline: str) -> bool:
    """Return True if the pipeline has a keyword index."""
    row = connection.execute(_HAS_KEYWORDS, (pipeline,)).fetchone()
    return bool(row and row[0])


def require_seen(connection: Connection, folder: Path) -> None:
    """Raise NotReady if the server does not see the directory of the new model."""
    try:
        row = connection.execute(_SEES, (str(folder),)).fetchone()
    except psycopg.Error as error:
        raise NotReady(
            f"the server cannot look into {folder}: {error.diag.message_primary}",
            hint="Name a directory with --output that the server's operating system user can read.",
        ) from None
    if row is None or not row[0]:
        raise NotReady(
            f"the server sees no directory {folder}",
            hint="Train on the server, or on storage that it shares, and name the model's directory there with --model-path.",
        )


def register(
    connection: Connection, name: str, path: str, lineage: dict[str, Any], pairs: Sequence[tuple[Pair, bool]]
) -> None:
    """Register the model and its lineage, in one transaction."""
    rows = [{**_plain(pair), "is_held_out": held_out} for pair, held_out in pairs]
    with connection.transaction():
        connection.execute(_REGISTER, (name, path, lineage["base"]))
        connection.execute(_RECORD, (name, json.dumps(lineage), json.dumps(rows)))


def _plain(pair: Pair) -> dict[str, Any]:
    return asdict(pair)


def read_training(connection: Connection, name: str) -> Training:
    """Return how a model was trained; raise NotFound."""
    row = connection.execute(_TRAINING, (name,)).fetchone()
    if row is None:
        raise NotFound(
            f'no training of a model "{name}" is recorded',
            hint="SELECT m.name, t.base, t.outcome FROM embedline.training AS t JOIN embedline.model AS m USING (model_id);"
            " lists them.",
        )
    pairs = connection.execute(_PAIRS, (row[16],)).fetchall()
    return Training(
        model=row[0], base=Base(row[1], row[2], row[13], row[3], row[14], row[15]), pipeline=row[4], pairs_table=row[5],
        pairs_hash=row[6], parameters=row[7], seed=row[8], code_version=row[9], evidence=row[10], metrics=row[11],
        outcome=row[12], pairs=[Pair(*found[:5]) for found in pairs], held_out=[found[5] for found in pairs],
    )  # fmt: skip
