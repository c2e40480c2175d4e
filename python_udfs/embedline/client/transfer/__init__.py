"""Vectors out of a database, and into a pipeline."""
