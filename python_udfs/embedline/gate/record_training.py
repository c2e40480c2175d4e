"""Note what a model was trained on."""

from __future__ import annotations

import json

from embedline.catalog.load import load_embedding_model
from embedline.catalog.rights import caller, require_superuser
from embedline.core.json_values import as_list, as_mapping
from embedline.core.query_hash import query_hash
from embedline.errors import InvalidParameter
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session

_RECORD = """
    INSERT INTO embedline.training (model_id, model, model_fingerprint, base, base_model, base_fingerprint, pipeline,
        pairs_table, pairs_hash, parameters, seed, code_version, evidence, metrics, outcome, trained_by)
    SELECT $1, $2, $3, t.base, t.base_model, t.base_fingerprint, t.pipeline, t.pairs_table, t.pairs_hash, t.parameters,
        t.seed, t.code_version, t.evidence, t.metrics, t.outcome, $4
    FROM jsonb_populate_record(NULL::embedline.training, $5) AS t RETURNING training_id
"""
_PAIRS = """
    INSERT INTO embedline.training_pair (training_id, position, query, query_hash, key, grade, source, at, is_held_out)
    SELECT $1, $4 + r.position, p.query, r.hash, p.key, p.grade, p.source, p.at, p.is_held_out
    FROM unnest($2, $3) WITH ORDINALITY AS r (pair, hash, position)
    CROSS JOIN LATERAL jsonb_populate_record(NULL::embedline.training_pair, r.pair) AS p
"""
# Pairs of one statement: PL/Python builds an array of their texts.
_BLOCK = 5000


@entry_point
def record_training(session: Session, model_name: str, training: str, pairs: str) -> int:
    """Store the lineage of a model and a snapshot of its pairs; return its id.

    The hashes of the queries are made here, so that a gate compares its own.
    """
    require_superuser(session, "record what a model was trained on", "embedline finetune does so, as a superuser.")
    model, facts = load_embedding_model(session, model_name), as_mapping(json.loads(training))
    rows = [as_mapping(pair) for pair in as_list(json.loads(pairs))]
    if not rows:
        raise InvalidParameter("a training has pairs", hint="embedline finetune records them.")
    training_id = int(
        session.scalar(
            _RECORD, ["bigint", "text", "text", "text", "jsonb"],
            model.model_id, model.config.model, model.fingerprint, caller(session), json.dumps(facts),
        )
    )  # fmt: skip
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        hashes = [query_hash(str(pair["query"])) for pair in block]
        numbered = [json.dumps(pair) for pair in block]
        session.query(
            _PAIRS, ["bigint", "jsonb[]", "text[]", "integer"], training_id, numbered, hashes, start,
        )  # fmt: skip
    return training_id
