"""Alembic operations for models, pipelines and versions, and their autogeneration, for every Alembic environment.

`plugin` is what Alembic loads; `operations` says what there is and `implementation` what each does; `declaration` reads
the TOML file of pipelines, `comparison` compares it with the database, `autogenerate` and `chain` write revisions.
"""
