"""PL/Python and PostgreSQL: sessions, locks, errors, rights. Nothing of pipelines."""
