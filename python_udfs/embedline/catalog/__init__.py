"""Read Embedline's own tables as values: models, pipelines, versions, settings."""
