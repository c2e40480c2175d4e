"""Make a pipeline's chunker from its recipe."""

from __future__ import annotations

from embedline.chunking.chunk import Chunker, whole_text
from embedline.chunking.fixed import fixed_split
from embedline.chunking.markdown import markdown_split
from embedline.chunking.measure import measure_of
from embedline.chunking.measured import MeasuredChunker, Split
from embedline.chunking.recursive import recursive_split
from embedline.chunking.semantic import DEFAULT_PERCENTILE, EmbedSentences, SemanticSplit
from embedline.chunking.sentences import sentences_split
from embedline.chunking.spec import ChunkingSpec, chunking_spec
from embedline.errors import InvalidParameter

_SPLITS: dict[str, Split] = {
    "recursive": recursive_split,
    "sentences": sentences_split,
    "markdown": markdown_split,
    "fixed": fixed_split,
}


def make_chunker(spec: ChunkingSpec, tokenizer: str | None, embed: EmbedSentences | None) -> Chunker:
    """Return the chunker of a recipe.

    Tokens are the model's own if `tokenizer` is its tokenizer.json (the text).
    Otherwise they are estimated from the characters. `embed` makes the vectors of sentences for method 'semantic'; the
    others need none.
    """
    spec = chunking_spec(spec.method, spec.tokens, spec.overlap, dict(spec.options))
    if spec.tokens is None:
        return whole_text
    split = _SPLITS.get(spec.method)
    if split is None:
        if embed is None:
            raise InvalidParameter(
                "chunking 'semantic' needs the model that embeds sentences", hint="Pass embed to make_chunker."
            )
        split = SemanticSplit(embed, spec.option("percentile", DEFAULT_PERCENTILE))
    return MeasuredChunker(measure_of(tokenizer), spec.tokens, spec.overlap, split)


def recursive_chunker(tokenizer: str | None, tokens: int, overlap: int = 0) -> Chunker:
    """Return a chunker that splits at the largest boundary within `tokens`.

    Boundaries are paragraphs, sentences and words.
    """
    return make_chunker(ChunkingSpec("recursive", tokens, overlap), tokenizer, None)
