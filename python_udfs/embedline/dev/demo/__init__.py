"""Make the PostgreSQL manual searchable by meaning (`make demo`)."""
