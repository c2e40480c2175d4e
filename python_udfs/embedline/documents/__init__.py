"""Read, compare and write source rows, their chunks and their vectors."""
