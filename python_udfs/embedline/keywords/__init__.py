"""The keyword index: which words stand in which chunks, ranked by BM25.

Each chunk set of a pipeline with keywords has three tables. `entries` holds the words of chunks that were written last,
one row a chunk, in the same transaction as the chunk. Workers pack entries into segments of up to 65,536 chunks; the
words of a segment lie in its pages, by word. A search reads the pages of its words and the entries.
"""
