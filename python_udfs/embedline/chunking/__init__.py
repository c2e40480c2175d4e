"""Chunking: a text becomes consecutive slices that a model can read whole.

`make_chunker` turns a pipeline's `ChunkingSpec` into a `Chunker`. A chunker that measures is a `Split` in a module of its
own, run by `MeasuredChunker`, which gives a short text back at once and keeps room for the prefix in every chunk.
"""

from __future__ import annotations

from embedline.chunking.chunk import Chunk, Chunker, content_digest, whole_text
from embedline.chunking.factory import make_chunker, recursive_chunker
from embedline.chunking.halves import cut_chunks, halves
from embedline.chunking.measure import CHARACTERS_PER_TOKEN, average_tokens, estimated_size
from embedline.chunking.semantic import EmbedSentences
from embedline.chunking.spec import METHODS, ChunkingSpec, chunking_spec

__all__ = [
    "CHARACTERS_PER_TOKEN",
    "METHODS",
    "Chunk",
    "Chunker",
    "ChunkingSpec",
    "EmbedSentences",
    "average_tokens",
    "chunking_spec",
    "content_digest",
    "cut_chunks",
    "estimated_size",
    "halves",
    "make_chunker",
    "recursive_chunker",
    "whole_text",
]
