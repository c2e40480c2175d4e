"""The model host: one process per local model and server, shared by all its backends over a Unix socket.

`launcher` and `protocol` are imported by backends and must stay light; `server` and `inference` run in the host only.
"""
