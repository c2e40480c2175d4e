"""Embed what waits: claims, batches, and the two forms of the worker."""
