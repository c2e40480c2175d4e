"""Rank a version's chunks, for search, for the gate, and to measure either."""
