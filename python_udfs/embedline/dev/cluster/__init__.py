"""The local cluster of `make up`: system packages, pgvector, virtual environment, models, and a server of its own.

`python3 -m embedline.dev.cluster.bootstrap STEP` runs under the system's Python before anything is installed, so
everything here is standard library only, except `models` and `install`, which the bootstrap runs in the virtual
environment.
"""
