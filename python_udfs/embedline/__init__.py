"""Embedline: vector embeddings in PostgreSQL, kept true to their source rows."""

__version__ = "0.1.0"
