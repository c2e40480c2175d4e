"""Registered models: their embedders, circuit breakers and health."""
