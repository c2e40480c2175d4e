"""Estimate what embedding a table takes: rows, tokens, money, bytes and hours."""
