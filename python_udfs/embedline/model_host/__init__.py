"""Serve one local model per process, shared by all backends of a server.

Backends reach the host over a Unix socket. They import `launcher` and `protocol`, which must stay light. `server` and
`inference` run in the host only.
"""
