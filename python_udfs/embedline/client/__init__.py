"""Commands of a shell and Alembic operations: they call the SQL interface and import no server package."""
