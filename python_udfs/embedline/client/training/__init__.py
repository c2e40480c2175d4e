"""Train a registered model further on pairs of queries and rows, in a shell."""
