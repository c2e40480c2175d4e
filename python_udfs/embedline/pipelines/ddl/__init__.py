"""The SQL text of a pipeline's generated tables, functions, triggers and views."""
