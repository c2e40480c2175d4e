"""A model host as the server starts it, but for its model, which a function of the tests or of the benches makes.

No option of a model leads here. As a program: `injected_host.py FILE FUNCTION SOCKET SETTINGS OWNER_PID OWNER_START`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from embedline.core.embedding import ModelConfig
from embedline.embedders.local import LocalEmbedder
from embedline.model_host.host_settings import HostSettings
from embedline.model_host.launcher import connect, host_environment
from embedline.model_host.place import Owner, prepare_place

_START_SECONDS = 60.0


@contextlib.contextmanager
def injected_host(file: str, function: str, settings: HostSettings, root: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the host for this process, with files below `root`; its model is what `function` of `file` makes of settings."""
    owner = Owner.of(os.getpid())
    place = prepare_place(settings, owner, root)
    arguments = [place.socket, json.dumps(dataclasses.asdict(settings)), str(owner.pid), str(owner.start_ticks)]
    # Where an embedder looks for the last words of a host.
    with open(place.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
        process = subprocess.Popen(
            [sys.executable, __file__, file, function, *arguments],
            env=host_environment(settings),
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while (connection := connect(place)) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the host did not start: {Path(place.log).read_text()}")
            time.sleep(0.01)
        connection.close()
        yield process
    finally:
        process.kill()
        process.wait()


def embedder_of(settings: HostSettings, root: str, owner_pid: int, concurrency: int = 8) -> LocalEmbedder:
    """Return an embedder that asks the host with these settings."""
    config = ModelConfig("injected", "sentence-transformers", settings.model, concurrency=concurrency)
    return LocalEmbedder(config, owner_pid=owner_pid, runtime_root=root, settings=settings)


def _main() -> None:
    from embedline.model_host.server import serve

    file, function, socket, settings, pid, start = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("injected_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.umask(0o077)
    serve(socket, HostSettings(**json.loads(settings)), Owner(int(pid), int(start)), getattr(module, function))


if __name__ == "__main__":
    _main()
