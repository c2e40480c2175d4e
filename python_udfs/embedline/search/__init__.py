"""Rank a version's chunks: for search, for the gate, and for the measurement of either."""
