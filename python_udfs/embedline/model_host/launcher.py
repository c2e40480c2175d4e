"""Find the running model host of a model, or start it.

Files of a host lie in `<temporary directory>/embedline-<euid>/<postmaster pid>-<its start time>/`, mode 0700:
`<name>.sock`, `<name>.lock` (held while a host is started or leaves), `<name>.log`, `<name>.tokenizer.json`. The name
is a hash of the settings that decide the vectors, so each model has one host per server. Backends load this module, so
it has light imports only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator

from embedline.errors import ModelHostUnavailable, ProviderMisconfigured
from embedline.model_host.host_settings import START_SECONDS, HostSettings
from embedline.model_host.place import HostPlace, Owner, remove_stale_places

LOG_TAIL_BYTES = 2000
LOG_TAIL_LINES = 12
_POLL_SECONDS = 0.005
_SECRETS = re.compile(r"\b(?:hf|sk)[-_][A-Za-z0-9_*.-]{6,}|(?i:bearer)\s+\S+|(?<=://)[^/\s@]+@")
# Variables that a host inherits. All others are left out, above all API keys in the server's environment.
_ENVIRONMENT = re.compile(
    r"(?:PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|TZ|TMPDIR|LD_LIBRARY_PATH|LD_PRELOAD|SENTENCE_TRANSFORMERS_HOME"
    r"|(?:LC|HF|HUGGINGFACE|TRANSFORMERS|TORCH|PYTORCH|TORCHINDUCTOR|TOKENIZERS|SAFETENSORS|ORT|OMP|MKL|KMP|GOMP|OPENBLAS"
    r"|CUDA|NVIDIA|HIP|ROCM|ROCR|XDG|SSL|REQUESTS|CURL|MALLOC)_\w+|(?i:https?|all|no)_(?i:proxy))"
)


def connect(place: HostPlace) -> socket.socket | None:
    """Return a non-blocking connection to the running host, None if none listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A Unix socket connects at once or fails with EAGAIN. A blocking connect would wait for a host that hangs.
    connection.setblocking(False)
    try:
        connection.connect(place.socket)
        _check_peer(connection)
    except OSError as error:
        connection.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN):
            return None
        raise ModelHostUnavailable("cannot connect to the model host", detail=str(error)) from error
    except ProviderMisconfigured:
        connection.close()
        raise
    return connection


def peer_uid(connection: socket.socket) -> int:
    """Return the effective user id of the process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _check_peer(connection: socket.socket) -> None:
    if peer_uid(connection) != os.geteuid():
        raise ProviderMisconfigured("the model host's socket belongs to another operating-system user")


def connect_or_start(
    place: HostPlace, settings: HostSettings, owner: Owner, give_up: Callable[[], bool]
) -> socket.socket:
    """Return a connection to the host, starting it if need be.

    Sessions that need the same host at once queue at the lock: one starts it, the others find it running. `give_up`
    is asked while waiting. Raises ModelHostUnavailable with the end of the host's log.
    """
    deadline = time.monotonic() + settings.start_seconds
    with launch_lock(place, lambda: give_up() or time.monotonic() > deadline):
        connection = connect(place)
        if connection is not None:
            return connection
        remove_stale_places(os.path.dirname(place.directory))
        _spawn(place, settings, owner)
        while time.monotonic() < deadline and not give_up():
            connection = connect(place)
            if connection is not None:
                return connection
            if not host_alive(place):
                raise ModelHostUnavailable("the model host did not start", detail=log_tail(place))
            time.sleep(_POLL_SECONDS)
    message = f"the model host did not start within {settings.start_seconds:.0f} s"
    raise ModelHostUnavailable(message, detail=log_tail(place))


@contextlib.contextmanager
def launch_lock(place: HostPlace, give_up: Callable[[], bool]) -> Iterator[None]:
    """Hold the lock under which hosts start and leave.

    Raises ModelHostUnavailable when `give_up` returns True.
    """
    file = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while not _try_lock(file):
            if give_up():
                raise ModelHostUnavailable("another session is still starting the model host")
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _spawn(place: HostPlace, settings: HostSettings, owner: Owner) -> None:
    # Imported here, because a session that finds the host running does not need it.
    import subprocess

    with contextlib.suppress(FileNotFoundError):
        os.replace(place.log, f"{place.log}.old")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    log = os.open(place.log, flags, 0o600)
    try:
        # The host inherits this open file with its lock, so the lock lasts exactly as long as the host.
        fcntl.flock(log, fcntl.LOCK_EX)
        arguments = ["--socket", place.socket, "--config-json", json.dumps(dataclasses.asdict(settings))]
        arguments += ["--owner-pid", str(owner.pid), "--owner-start", str(owner.start_ticks)]
        # -P, because `-m` would otherwise put the current directory, the server's data directory, on the module path.
        starter = subprocess.Popen(
            [interpreter(), "-P", "-m", "embedline.model_host", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=host_environment(settings),
            start_new_session=True,
        )
    except OSError as error:
        raise ModelHostUnavailable("cannot run the model host", detail=str(error)) from error
    finally:
        os.close(log)
    try:
        # It forks and exits at once, before it imports anything.
        starter.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        starter.kill()
        starter.wait()


def interpreter() -> str:
    """Return the path of the Python to run.

    Inside PL/Python sys.executable may be empty, or the postgres binary.
    """
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = os.path.join(sys.exec_prefix or sys.base_exec_prefix, "bin", name)
    return path if os.access(path, os.X_OK) else "/usr/bin/python3"


def host_environment(settings: HostSettings) -> dict[str, str]:
    """Return the environment of a host, whichever session starts it."""
    # The host of remote models asks providers in the sessions' place, so it needs the keys that they would read.
    kept = {n: value for n, value in os.environ.items() if settings.is_remote or _ENVIRONMENT.fullmatch(n)}
    # OpenMP threads that wait by spinning take the cores from the threads they wait for, as soon as the server is busy,
    # too. Beside two busy processes on 2 cores, one MiniLM query took 134 ms, and 26 ms with threads that sleep.
    # Batches had 21 and 82 texts/s.
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A backend sets these for itself, and a worker's backend before it starts a host. So they are no choice of the server.
    # The host is one process for all backends, and its tokenizer and its passes may have all cores.
    cores = str(len(os.sched_getaffinity(0)))
    kept |= {"OMP_NUM_THREADS": cores, "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}
    return kept | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "PYTHONUNBUFFERED": "1"}


def host_alive(place: HostPlace) -> bool:
    """Return True if the host that writes the log still runs.

    It holds the log's lock.
    """
    try:
        file = os.open(place.log, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(file)
    finally:
        os.close(file)


def log_tail(place: HostPlace) -> str | None:
    """Return the last lines of the host's log, None if there is no log.

    Text that looks like a key is left out.
    """
    try:
        with open(place.log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8 * LOG_TAIL_BYTES))
            # Redacted before it is cut, because half a key would not be recognised.
            text = _SECRETS.sub("[redacted]", file.read().decode(errors="replace"))
    except FileNotFoundError:
        return None
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])[-LOG_TAIL_BYTES:] or None
