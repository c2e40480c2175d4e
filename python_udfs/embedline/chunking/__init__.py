"""Chunk a text into consecutive slices that a model can read whole.

`factory.make_chunker` turns a pipeline's `ChunkingSpec` into a `Chunker`. A chunker that measures is a `Split` in a
module of its own. `MeasuredChunker` runs it, returns a short text at once, and keeps room for the prefix in every
chunk.
"""

from embedline.chunking.chunk import Chunk
from embedline.chunking.spec import METHODS, ChunkingSpec, chunking_spec

__all__ = ["METHODS", "Chunk", "ChunkingSpec", "chunking_spec"]
