"""Source rows, their chunks and their vectors: read, compared, written."""
