"""Set up the local cluster of `make up`.

It has system packages, pgvector, a virtual environment, models, and a server of its own. `python3 -m
embedline.dev.cluster.bootstrap STEP` runs under the system's Python before anything is installed. So everything here is
standard library only, except `models` and `install`, which the bootstrap runs in the virtual environment.
"""
