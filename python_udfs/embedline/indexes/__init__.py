"""Vector indexes: their definitions, the memory and disk that a build takes, and the builds."""
