"""Measure a version before it serves: its index, its model, and its results."""
