"""Wrap PL/Python and PostgreSQL: sessions, locks, errors, rights.

Nothing in this package knows pipelines.
"""
