"""Create, alter, follow and drop pipelines."""
