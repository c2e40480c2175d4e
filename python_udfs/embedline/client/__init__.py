"""Run commands of a shell and Alembic operations.

They call the SQL interface and import no server package.
"""
