"""Versions of a pipeline: add, fill, share traffic, cut over, drop."""
