"""List the model hosts that run for this server."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from embedline.errors import ModelHostUnavailable, ProviderMisconfigured
from embedline.model_host.launcher import connect
from embedline.model_host.place import HostPlace, Owner


@dataclass(frozen=True)
class RunningHost:
    """A model host: its name, a hash of its settings, and its process."""

    name: str
    pid: int

    @property
    def resident_bytes(self) -> int:
        """The memory that it has in use; 0 once it is gone."""
        try:
            with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (FileNotFoundError, ProcessLookupError):
            return 0


def running_hosts(postmaster: int) -> list[RunningHost]:
    """Return the hosts of a server, by the process number of its postmaster."""
    try:
        owner = Owner.of(postmaster)
    except ModelHostUnavailable:
        return []
    folder = os.path.join(tempfile.gettempdir(), f"embedline-{os.geteuid()}", f"{owner.pid}-{owner.start_ticks}")
    return list(_hosts_in(folder))


def _hosts_in(folder: str) -> Iterator[RunningHost]:
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".sock"))
    except FileNotFoundError:
        return
    for name in names:
        place = HostPlace.of_socket(os.path.join(folder, name))
        try:
            connection = connect(place)
        except (ModelHostUnavailable, ProviderMisconfigured):
            continue
        if connection is not None:
            with connection:
                yield RunningHost(place.name, _peer_pid(connection))


def _peer_pid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])
