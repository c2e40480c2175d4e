"""Work that SQL functions hand out to processes outside the database."""
