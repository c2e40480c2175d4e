"""Cut contents of a pipeline by several chunkings, and embed the chunks.

The pipeline's own model embeds, within its budgets and rate limits. Everything is reserved before the first request, so a
comparison that may not be paid for costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from embedline.catalog import progress
from embedline.catalog.load import load_pipeline
from embedline.catalog.rights import require_control
from embedline.catalog.values import Pipeline
from embedline.chunking import Chunk, ChunkingSpec
from embedline.chunking.factory import make_chunker
from embedline.core import vectors
from embedline.core.json_values import as_list, as_mapping
from embedline.core.processes import prepare_environment
from embedline.core.recipe import ChunkingChoice
from embedline.core.request_tokens import likely_tokens, plausible_tokens
from embedline.core.vectors import FloatMatrix
from embedline.errors import InvalidParameter, NotReady, UnusableText
from embedline.estimate.measure import count_tokens
from embedline.models import circuit
from embedline.models.pool import embedder_for, let_cancel_through, wait_result
from embedline.models.sentence_embedder import sentence_embedder
from embedline.pipelines.recipe_check import next_chunking
from embedline.postgres.claims import CALLERS_TRANSACTION
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.spending import ledger

# Keys of a chunking in jsonb, parameters of alter_pipeline, with the types of their values.
_KEYS = {"chunking": str, "chunk_tokens": int, "chunk_overlap": int, "chunking_options": dict}
# Texts of one request. With chunks of the longest context it stays below the provider's limit of tokens.
_REQUEST_TEXTS = 16
_MOST_SPECS = 20


@dataclass(frozen=True)
class _Cut:
    """The chunks of the sample by one chunking, each with its document.

    `sentences` is True if the model has to embed each sentence first, to find the cuts.
    """

    documents: list[int]
    chunks: list[Chunk]
    sentences: bool

    @property
    def texts(self) -> list[str]:
        """Return what the model reads."""
        return [chunk.embedded_text for chunk in self.chunks]


def chunkings(pipeline: Pipeline, specs: Any) -> list[ChunkingSpec]:
    """Return the pipeline's own chunking, and the others of a jsonb array, each once."""
    given = as_list(specs)
    if not 1 <= len(given) <= _MOST_SPECS:
        raise InvalidParameter(
            f"specs must be a JSON array of 1 to {_MOST_SPECS} chunkings",
            hint="""Give an array such as '[{"chunk_tokens": 128}, {"chunking": "sentences", "chunk_tokens": 400}]'.""",
        )
    found = [pipeline.spec]
    for number, item in enumerate(given, 1):
        spec = as_mapping(item)
        unknown = sorted(set(spec) - set(_KEYS))
        wrong = [name for name, kind in _KEYS.items() if not isinstance(spec.get(name), kind | None)]
        if not spec or unknown or wrong:
            what = (
                f'has no key "{unknown[0]}"'
                if unknown
                else f"has another type of {wrong[0]}"
                if wrong
                else "is no object"
            )
            raise InvalidParameter(f"chunking {number} of specs {what}", hint=f"Its keys are {', '.join(_KEYS)}.")
        choice = ChunkingChoice.from_parameters({key: spec.get(key) for key in _KEYS})
        chosen = next_chunking(choice, pipeline.spec, pipeline.version.model)
        # A whole content has no overlap with another chunk.
        found.append(chosen if chosen.tokens is not None else replace(chosen, overlap=0))
    return list(dict.fromkeys(found))


@entry_point
def embed_chunkings(
    session: Session, name: str, specs: Any, chunk_ids: Sequence[int], contents: Sequence[str], is_cut_only: bool
) -> list[dict[str, Any]]:
    """Return the chunks of repaired contents by each chunking.

    They have tokens and vectors.

    `chunk_ids` names a stored chunk of each content, whose prefix the new ones get. Vectors are float32, as the
    pipeline would store them. With `is_cut_only` there are none, and nothing is sent. Raises NotReady if budgets or
    rate limits do not allow all of it now.
    """
    require_control(session, name)
    prepare_environment()
    pipeline = load_pipeline(session, name)
    model = pipeline.version.model
    if not is_cut_only and circuit.is_open(session, model.model_id):
        raise NotReady(f'model "{model.config.name}" is unavailable for now', hint="SELECT * FROM embedline.circuit;")
    cutting = _Cutting(session, pipeline, list(contents), _prefixes(session, pipeline, chunk_ids))
    found = chunkings(pipeline, specs)
    cuts = [cutting.without_model(spec) for spec in found]
    reservation = None if is_cut_only else _reserve(session, pipeline, cuts, contents)
    rows: list[dict[str, Any]] = []
    used: int | None = 0
    for number, (spec, rough) in enumerate(zip(found, cuts, strict=True)):
        cut = rough if is_cut_only or not rough.sentences else cutting.by_model(spec)
        matrix, told = (None, 0) if is_cut_only else _embed(session, pipeline, cut.texts)
        # The count of sentences is not told, so the estimate stays.
        used = None if used is None or told is None or cut.sentences else used + told
        tokens = [count_tokens(cutting.tokenizer, [text]) for text in cut.texts]
        rows += [
            {
                "spec": number, "document": document, "chunk_start": chunk.start, "chunk_end": chunk.end,
                "tokens": round(tokens[place]), "vector": None if matrix is None else matrix[place].astype("<f4").tobytes(),
            }
            for place, (document, chunk) in enumerate(zip(cut.documents, cut.chunks, strict=True))
        ]  # fmt: skip
    if reservation is not None:
        ledger.settle(session, reservation, used)
    return rows


class _Cutting:
    """Cuts contents as the pipeline's workers would."""

    def __init__(self, session: Session, pipeline: Pipeline, contents: list[str], prefixes: list[str]) -> None:
        self._session, self._pipeline = session, pipeline
        self._contents, self._prefixes = contents, prefixes
        self.tokenizer: str | None = session.scalar(
            "SELECT tokenizer FROM embedline.model WHERE model_id = $1", ["bigint"], pipeline.version.model.model_id
        )

    def without_model(self, spec: ChunkingSpec) -> _Cut:
        """Return the chunks, of semantic chunking those of whole sentences."""
        is_semantic = spec.method == "semantic"
        return self._cut(replace(spec, method="sentences", options=()) if is_semantic else spec, is_semantic)

    def by_model(self, spec: ChunkingSpec) -> _Cut:
        """Return the chunks of semantic chunking."""
        return self._cut(spec, True)

    def _cut(self, spec: ChunkingSpec, sentences: bool) -> _Cut:
        chunker = make_chunker(spec, self.tokenizer, sentence_embedder(self._session, self._pipeline.version))
        breathe, cut = let_cancel_through(self._session), _Cut([], [], sentences)
        for number, (content, prefix) in enumerate(zip(self._contents, self._prefixes, strict=True)):
            # A content without a text to embed becomes a dead letter.
            with contextlib.suppress(UnusableText):
                for chunk in chunker(content, breathe, prefix):
                    cut.documents.append(number)
                    cut.chunks.append(chunk)
            breathe()
        return cut


def _prefixes(session: Session, pipeline: Pipeline, chunk_ids: Sequence[int]) -> list[str]:
    """Return the document prefix of each content.

    The chunks of Markdown have their headings in it, which the chunker writes itself.
    """
    if pipeline.spec.method == "markdown":
        return [""] * len(chunk_ids)
    rows = session.query(
        f"SELECT coalesce(c.prefix, '') AS prefix FROM unnest($1) WITH ORDINALITY AS g (chunk_id, position)"
        f" LEFT JOIN {pipeline.chunk} AS c ON c.chunk_id = g.chunk_id ORDER BY g.position",
        ["bigint[]"], list(chunk_ids),
    )  # fmt: skip
    return [str(row["prefix"]) for row in rows]


def _batches(pipeline: Pipeline, texts: Sequence[str]) -> list[Sequence[str]]:
    size = min(pipeline.version.model.config.max_batch_items, _REQUEST_TEXTS)
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def _reserve(session: Session, pipeline: Pipeline, cuts: Sequence[_Cut], contents: Sequence[str]) -> int | None:
    """Reserve all requests, or raise NotReady.

    Returns the reservation if there is a ledger.
    """
    costs = [sum(map(likely_tokens, batch)) for cut in cuts for batch in _batches(pipeline, cut.texts)]
    # Sentences are embedded to find the cuts, which costs as much again.
    costs += [likely_tokens(content) for cut in cuts if cut.sentences for content in contents]
    grant = ledger.reserve(session, pipeline, costs, CALLERS_TRANSACTION)
    if grant.count < len(costs):
        raise NotReady(
            f"comparing {len(cuts)} chunkings takes about {sum(costs)} tokens, more than may be sent now: {grant.reason}",
            hint="Compare fewer chunkings, or take a smaller sample (sample_rows); estimate_only => true counts without sending.",
        )
    return grant.reservation_id


def _embed(session: Session, pipeline: Pipeline, texts: Sequence[str]) -> tuple[FloatMatrix, int | None]:
    """Return vectors as the pipeline would store them, and their tokens.

    Tokens are None if the provider does not tell. A vector without a direction is all zeros.
    """
    version, breathe = pipeline.version, let_cancel_through(session)
    if not texts:
        return np.zeros((0, version.dimensions), dtype=np.float32), 0
    embedder, batches = embedder_for(session, version.model), _batches(pipeline, texts)
    blocks, futures = [], [embedder.submit(list(batch), "document") for batch in batches]
    for number, future in enumerate(futures):
        progress.report(session, "embedding a sample", number, len(futures))
        blocks.append(wait_result(future, breathe))
    prefix = version.model.config.document_prefix
    told = [plausible_tokens(b.tokens, batch, prefix) for b, batch in zip(blocks, batches, strict=True)]
    matrix = np.concatenate([vectors.matrix_from_bytes(b.data, b.count, b.dimensions) for b in blocks])
    vectors.check_shape(matrix, len(texts), version.dimensions)
    usable, faults = vectors.usable_vectors(matrix, version.column_type, version.distance != "l2")
    stored = usable.astype(np.float32)
    stored[list(faults)] = 0
    return stored, None if None in told else sum(count for count in told if count is not None)
