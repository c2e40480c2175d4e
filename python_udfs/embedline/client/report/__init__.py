"""Report on the pipelines of a database in one HTML file."""
