"""Find the processes of model hosts and their memory."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from collections.abc import Iterator

from embedline.catalog.load import load_models
from embedline.errors import EmbedlineError
from embedline.model_host.host_settings import HostSettings, remote_settings, settings_of
from embedline.model_host.launcher import connect
from embedline.model_host.place import HostPlace, Owner
from embedline.postgres.session import Session

# The label of the host that asks the providers of remote models.
_REMOTE = "remote"


def resident_bytes(session: Session) -> Iterator[tuple[str, int]]:
    """Yield the resident memory of each host that runs, by the names of its models."""
    owner = Owner.of(os.getppid())
    base = os.path.join(tempfile.gettempdir(), f"embedline-{os.geteuid()}")
    folder = os.path.join(base, f"{owner.pid}-{owner.start_ticks}")
    if not os.path.isdir(folder):
        return
    hosts: dict[str, list[str]] = {}
    for name, settings in _settings(session):
        hosts.setdefault(settings.name, []).append(name)
    for host, names in hosts.items():
        resident = _resident(HostPlace(folder, host))
        if resident is not None:
            # Models that differ only in settings that leave vectors alone share a host.
            yield min(names), resident


def _settings(session: Session) -> Iterator[tuple[str, HostSettings]]:
    for model in load_models(session):
        if model.config.provider == "sentence-transformers":
            yield model.config.name, settings_of(model.config)
    yield _REMOTE, remote_settings()


def _resident(place: HostPlace) -> int | None:
    """Return the resident bytes of the process that listens, None if none does."""
    try:
        connection = connect(place)
    except (EmbedlineError, OSError):
        return None
    if connection is None:
        return None
    with connection:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    try:
        with open(f"/proc/{struct.unpack('3i', credentials)[0]}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None
