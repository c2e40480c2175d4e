"""Finds the running model host of a model, or starts it: what a backend needs to know of the host.

Files of a host lie in `<temporary directory>/embedline-<euid>/<postmaster pid>-<its start time>/`, mode 0700:
`<name>.sock`, `<name>.lock` (held while a host is started or leaves), `<name>.log`, `<name>.tokenizer.json`. The name
is a hash of what decides the vectors, so each model has one host per server. Light imports only: backends load this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import socket
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import embedline
from embedline.core.embedding import ModelConfig
from embedline.errors import InvalidParameter, ModelHostUnavailable, ProviderMisconfigured
from embedline.model_host.choice import choose_backend
from embedline.model_host.protocol import PROTOCOL_VERSION
from embedline.providers.options import Option, check_options

# From spawning to listening, before anything heavy is imported; measured 0.1 s, a loaded machine may need more.
START_SECONDS = 20.0
LOG_TAIL_BYTES = 2000
LOG_TAIL_LINES = 12
# sun_path holds 108 bytes on Linux; the margin is for platforms with 104.
MAX_SOCKET_PATH = 100
_POLL_SECONDS = 0.005
_SECRETS = re.compile(r"\b(?:hf|sk)[-_][A-Za-z0-9_*.-]{6,}|(?i:bearer)\s+\S+|(?<=://)[^/\s@]+@")
# Everything else stays behind, above all the API keys that the server's environment may hold.
_ENVIRONMENT = re.compile(
    r"(?:PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|TZ|TMPDIR|LD_LIBRARY_PATH|LD_PRELOAD|SENTENCE_TRANSFORMERS_HOME"
    r"|(?:LC|HF|HUGGINGFACE|TRANSFORMERS|TORCH|PYTORCH|TORCHINDUCTOR|TOKENIZERS|SAFETENSORS|ORT|OMP|MKL|KMP|GOMP|OPENBLAS"
    r"|CUDA|NVIDIA|HIP|ROCM|ROCR|XDG|SSL|REQUESTS|CURL|MALLOC)_\w+|(?i:https?|all|no)_(?i:proxy))"
)


# The backend of the host of remote models; no option names it.
_REMOTE = "remote"
# Limit of its data in MB. A host with one model had 96 MB of data and 59 MB resident; each thread reserves 8 more.
_REMOTE_MEMORY_MB = 1024
# Seconds. It is small, and a search that has to start it pays the import of the client: so it waits longer than other hosts.
_REMOTE_IDLE_SECONDS = 3600.0
# Seconds after which a session that still has no host asks the provider itself.
_REMOTE_START_SECONDS = 5.0

PRECISIONS = {"torch": ("float32", "float16", "bfloat16"), "onnx": ("float32", "int8")}
_ALL_PRECISIONS = tuple(dict.fromkeys(name for names in PRECISIONS.values() for name in names))


def _choice(names: tuple[str, ...], hint: str) -> Option:
    return Option(lambda value: value in names, " or ".join(f'"{name}"' for name in names), hint)


_OPTIONS = {
    "backend": _choice(("auto", *PRECISIONS), 'onnx is faster on processors: options => \'{"backend": "onnx"}\'.'),
    "precision": _choice(
        _ALL_PRECISIONS, 'For example options => \'{"backend": "onnx", "precision": "int8"}\' on a processor.'
    ),
    "device": Option(
        lambda value: isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None,
        '"auto", "cpu", "cuda" or "cuda:N"',
        "Leave it out: the host then takes an accelerator where there is one.",
    ),
    "memory_limit_mb": Option(
        lambda value: type(value) is int and value > 0, "a positive whole number", "In MB; the default is 4096."
    ),
    "idle_seconds": Option(
        lambda value: type(value) in (int, float) and value > 0, "a positive number", "In seconds; the default is 900."
    ),
    # Not the host's: the chunker's limit in place of the model's own.
    "max_tokens": Option(
        lambda value: type(value) is int and value > 0, "a positive whole number", "Leave it out: the model knows."
    ),
}


@dataclass(frozen=True)
class HostSettings:
    """What a host must know to load its model and to look after itself.

    `backend` is torch, onnx or static; auto for a model of the hub, whose files the host has yet to see.
    """

    model: str
    revision: str | None = None
    backend: str = "torch"
    device: str | None = None
    precision: str = "float32"
    memory_limit_mb: int = 4096
    idle_seconds: float = 900.0
    start_seconds: float = START_SECONDS

    @property
    def is_remote(self) -> bool:
        """Whether the host has no model of its own: it asks the providers of remote models."""
        return self.backend == _REMOTE

    @property
    def name(self) -> str:
        """A short name for what decides the vectors; two configs that differ elsewhere share one host."""
        identity = [PROTOCOL_VERSION, embedline.__version__, self.model, self.revision, self.backend]
        identity += [self.device, self.precision]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def remote_settings() -> HostSettings:
    """Return the settings of the server's one host of remote models."""
    return HostSettings(
        "remote models",
        # Workers keep the host running, so it would outlive a change of the package that leaves its version as it is.
        revision=_code_stamp(),
        backend=_REMOTE,
        memory_limit_mb=_REMOTE_MEMORY_MB,
        idle_seconds=_REMOTE_IDLE_SECONDS,
        start_seconds=_REMOTE_START_SECONDS,
    )


@functools.cache
def _code_stamp() -> str:
    """Return what changes with the code that the host runs."""
    package = os.path.dirname(embedline.__file__)
    folders = [os.path.join(package, name) for name in ("core", "model_host", "providers")]
    sources = [entry for folder in folders for entry in os.scandir(folder) if entry.name.endswith(".py")]
    return str(max((entry.stat().st_mtime_ns for entry in sources), default=0))


def settings_of(config: ModelConfig) -> HostSettings:
    """Read the host's settings out of the model's options; raises InvalidParameter, which names the option."""
    given = {name: value for name, value in config.options.items() if value is not None}
    check_options(config.name, given, _OPTIONS)
    # "auto" is the default in words: one host for both.
    fields = {name: given[name] for name in given if name != "max_tokens" and given[name] != "auto"}
    fields.setdefault("backend", _backend_of(config.model, fields))
    backend, precision = fields["backend"], fields.get("precision", "float32")
    offered = PRECISIONS.get(backend, ("float32",))
    if precision not in offered:
        others = [other for other, names in PRECISIONS.items() if precision in names]
        raise InvalidParameter(
            f'option "precision" of model "{config.name}": backend {backend} has no {precision}',
            hint=f'Add "backend": "{others[0]}", or choose {" or ".join(offered)}.',
        )
    return HostSettings(model=config.model, revision=config.revision, **fields)


def _backend_of(model: str, fields: dict[str, Any]) -> str:
    """Return what runs a model whose options name no backend."""
    on_cpu = not str(fields.get("device", "")).startswith("cuda")
    if os.path.isdir(model):
        chosen = choose_backend(model)
        # numpy has neither other precisions nor accelerators; a model prepared for onnxruntime has only its own form.
        return (
            "torch"
            if chosen == "static" and not (on_cpu and fields.get("precision", "float32") == "float32")
            else chosen
        )
    return "auto" if on_cpu and fields.get("precision", "float32") == "float32" else "torch"


@dataclass(frozen=True)
class Owner:
    """The process a host belongs to: the postmaster. The start time tells it from a later process of the same pid."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Owner:
        """Raises ModelHostUnavailable where there is no such process."""
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
    """Where the files of one host lie."""

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
    """Create the owner's directory where it is missing and return the host's place in it.

    Raises ProviderMisconfigured where someone else could have put the directory there: the socket gets users' texts.
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
    """Create a directory that only this user can use, or check that it is one; return it.

    Raises ProviderMisconfigured where it is open to others, OSError where it cannot be made.
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
    """Remove the directories of servers that are gone; a killed host could not tidy up after itself."""
    import shutil

    for entry in os.scandir(base):
        pid, _, start_ticks = entry.name.partition("-")
        if pid.isdecimal() and start_ticks.isdecimal() and not Owner(int(pid), int(start_ticks)).alive():
            # Another host of the same owner may be removing it as well.
            shutil.rmtree(entry.path, ignore_errors=True)


def connect(place: HostPlace) -> socket.socket | None:
    """Return a non-blocking connection to the running host, or None where none listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A Unix socket connects at once or says EAGAIN; a blocking connect would wait for a host that hangs.
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
    """The effective user id of the process at the other end."""
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
    """Hold the lock under which hosts start and leave; raises ModelHostUnavailable when `give_up` turns true."""
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
    # Imported here: a session that finds the host running does not need it.
    import subprocess

    with contextlib.suppress(FileNotFoundError):
        os.replace(place.log, f"{place.log}.old")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    log = os.open(place.log, flags, 0o600)
    try:
        # The host inherits this open file and with it the lock, which therefore lasts exactly as long as the host.
        fcntl.flock(log, fcntl.LOCK_EX)
        arguments = ["--socket", place.socket, "--config-json", json.dumps(dataclasses.asdict(settings))]
        arguments += ["--owner-pid", str(owner.pid), "--owner-start", str(owner.start_ticks)]
        # -P: `-m` would otherwise put the current directory, the server's data directory, on the module path.
        starter = subprocess.Popen(
            [interpreter(), "-P", "-m", "embedline.model_host", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(settings),
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
    """The Python to run. Inside PL/Python sys.executable may be empty, or the postgres binary."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = os.path.join(sys.exec_prefix or sys.base_exec_prefix, "bin", name)
    return path if os.access(path, os.X_OK) else "/usr/bin/python3"


def _environment(settings: HostSettings) -> dict[str, str]:
    # The host of remote models asks providers in the sessions' place, so it needs the keys that they would read.
    kept = {n: value for n, value in os.environ.items() if settings.is_remote or _ENVIRONMENT.fullmatch(n)}
    # OpenMP threads that wait by spinning take the cores from those they wait for, as soon as the server is busy too: one
    # MiniLM query beside two busy processes on 2 cores 134 ms, 26 ms with threads that sleep; batches 21 and 82 texts/s.
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return kept | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "PYTHONUNBUFFERED": "1"}


def host_alive(place: HostPlace) -> bool:
    """Whether the host that writes the log still runs: it holds the log's lock."""
    try:
        file = os.open(place.log, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(file)
    finally:
        os.close(file)


def log_tail(place: HostPlace) -> str | None:
    """The last lines of the host's log without anything that looks like a key, or None where there is no log."""
    try:
        with open(place.log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8 * LOG_TAIL_BYTES))
            # Redacted before it is cut: half a key would not be recognised.
            text = _SECRETS.sub("[redacted]", file.read().decode(errors="replace"))
    except FileNotFoundError:
        return None
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])[-LOG_TAIL_BYTES:] or None
