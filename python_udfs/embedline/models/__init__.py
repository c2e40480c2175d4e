"""Use registered models: embedders, circuit breakers and health checks."""
