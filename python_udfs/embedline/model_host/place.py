"""Find the socket, lock and log of a host, and check their owner."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from dataclasses import dataclass

from embedline.errors import ModelHostUnavailable, ProviderMisconfigured
from embedline.model_host.host_settings import HostSettings

# Longest path of a socket in bytes. sun_path holds 108 on Linux; the margin is for platforms with 104.
MAX_SOCKET_PATH = 100


@dataclass(frozen=True)
class Owner:
    """The process a host belongs to: the postmaster.

    The start time distinguishes it from a later process with the same pid.
    """

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Owner:
        """Return the owner of that pid.

        Raises ModelHostUnavailable if there is no such process.
        """
        start_ticks = _start_ticks(pid)
        if start_ticks is None:
            raise ModelHostUnavailable(f"process {pid}, which the model host would belong to, is gone")
        return cls(pid, start_ticks)

    def alive(self) -> bool:
        return _start_ticks(self.pid) == self.start_ticks


def _start_ticks(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            # The command name in parentheses may itself hold spaces and parentheses.
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass(frozen=True)
class HostPlace:
    """The paths of one host's files."""

    directory: str
    name: str

    @property
    def socket(self) -> str:
        return os.path.join(self.directory, f"{self.name}.sock")

    @property
    def lock(self) -> str:
        return os.path.join(self.directory, f"{self.name}.lock")

    @property
    def log(self) -> str:
        return os.path.join(self.directory, f"{self.name}.log")

    @property
    def tokenizer(self) -> str:
        return os.path.join(self.directory, f"{self.name}.tokenizer.json")

    @classmethod
    def of_socket(cls, path: str) -> HostPlace:
        return cls(os.path.dirname(path), os.path.basename(path).removesuffix(".sock"))


def prepare_place(settings: HostSettings, owner: Owner, root: str | None = None) -> HostPlace:
    """Return the host's place in the owner's directory, made if it is missing.

    Raises ProviderMisconfigured if another user could have put the directory there, because the socket gets users'
    texts.
    """
    base = os.path.join(root or tempfile.gettempdir(), f"embedline-{os.geteuid()}")
    make_private(base)
    directory = os.path.join(base, f"{owner.pid}-{owner.start_ticks}")
    make_private(directory)
    place = HostPlace(directory, settings.name)
    if len(os.fsencode(place.socket)) >= MAX_SOCKET_PATH:
        raise ProviderMisconfigured(
            "the path of the model host's socket is too long",
            detail=place.socket,
            hint="Start the server with a shorter TMPDIR.",
        )
    return place


def make_private(path: str) -> str:
    """Create a directory that only this user can use, or check that it is one.

    Returns the path. Raises ProviderMisconfigured if it is open to others, OSError if it cannot be made.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ProviderMisconfigured(
            f'"{path}" is not a directory that only the server can use',
            detail="It must be a real directory with mode 0700 that belongs to the server's operating-system user.",
            hint="Remove it, or start the server with another TMPDIR or XDG_CACHE_HOME.",
        )
    return path


def remove_stale_places(base: str) -> None:
    """Remove the directories of servers that are gone.

    A host that was killed could not remove its own.
    """
    import shutil

    for entry in os.scandir(base):
        pid, _, start_ticks = entry.name.partition("-")
        if pid.isdecimal() and start_ticks.isdecimal() and not Owner(int(pid), int(start_ticks)).alive():
            # Another host of the same owner may be removing it as well.
            shutil.rmtree(entry.path, ignore_errors=True)
