"""Publish pipelines to servers that only search, and write what these need."""
