"""Show how Embedline does: facts of the server, alerts, metrics, traces."""
