"""Alembic operations for models, pipelines and versions, with autogeneration.

They work in every Alembic environment. Alembic loads `plugin`. `operations` defines the operations;
`pipeline_operations`, `version_operations` and `index_operations` run them. `declaration` reads the TOML file of
pipelines and `comparison` compares it with the database. `autogenerate` and `chain` write revisions.
"""
