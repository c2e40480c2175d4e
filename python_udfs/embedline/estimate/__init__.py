"""Estimate the cost of embedding a table: rows, tokens, money, bytes, hours."""
