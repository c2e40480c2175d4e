"""Run a PostgreSQL server of our own, with one data directory and one port.

It is no part of the machine's clusters. PostgreSQL refuses to run as root, so a cluster that root starts runs as the
`postgres` OS user.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from embedline.dev.cluster.console import SetupError
from embedline.dev.cluster.server_user import as_server_user, as_server_user_ok, check_reachable, server_user

DATABASE = "embedline"
SUPERUSER = "postgres"
_HOST = "127.0.0.1"
_SOCKET_PATH_LIMIT = 107  # bytes of sockaddr_un.sun_path, less its final zero
_START_SECONDS = 60
# The line of embedline.conf that records the PYTHONPATH with which the server was started.
_PATH_COMMENT = "# PYTHONPATH: "
_LOG_LINES = 25
_SETTINGS = {
    "listen_addresses": _HOST,
    "max_connections": "100",
    "shared_buffers": "512MB",
    "maintenance_work_mem": "512MB",
    "max_wal_size": "4GB",
    "max_parallel_maintenance_workers": "2",
    "wal_level": "logical",
    # For tests of prepared transactions, which the default of 0 forbids.
    "max_prepared_transactions": "8",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "lc_messages": "C",
    "logging_collector": "on",
    "log_directory": "log",
    "log_filename": "postgresql.log",
    "log_rotation_age": "0",
    "log_rotation_size": "0",
    "log_line_prefix": "%m [%p] %q%u@%d ",
}
# Resident jobs need pg_cron's libpq mode, because before 1.5 a background worker that stays would block the launcher.
_CRON_SETTINGS = {
    "shared_preload_libraries": "pg_cron",
    "cron.use_background_workers": "off",
}
# Roles that may connect through the socket: the server's own user (pg_cron) as either, root as the superuser.
_IDENT_ROLES = (SUPERUSER, "embedline_worker")
# Variables that a server may inherit from its user. Any other one would make two servers differ by accident.
_INHERITED = re.compile(
    r"(\w+_API_KEY|EMBEDLINE_\w+|HF_\w+|(?i:https?_proxy|no_proxy|all_proxy)|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|TMPDIR|ASAN_OPTIONS)"
)


@dataclass(frozen=True)
class Cluster:
    """A PostgreSQL cluster that this checkout starts and stops.

    `settings` go into its configuration after Embedline's own; `environment` into the server's environment.
    `cron_database` names the database of pg_cron; None leaves pg_cron out.
    """

    data_dir: Path
    port: int
    bin_dir: Path
    python_path: str
    cron_database: str | None = DATABASE
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def password_file(self) -> Path:
        return self.data_dir / "embedline.password"

    @property
    def log_file(self) -> Path:
        return self.data_dir / "log" / "postgresql.log"

    @property
    def socket_dir(self) -> Path:
        """Return the folder of the socket.

        It is the data directory, which is private. If that path is too long or needs quoting, it is a folder under
        /tmp.
        """
        path = str(self.data_dir)
        if len(os.fsencode(f"{path}/.s.PGSQL.{self.port}.lock")) <= _SOCKET_PATH_LIMIT and re.fullmatch(
            r"[\w./+-]+", path
        ):
            return self.data_dir
        return Path(f"/tmp/embedline-{server_user().pw_uid}-{self.port}")  # noqa: S108  owner and mode are checked

    @property
    def initialised(self) -> bool:
        return as_server_user_ok(["test", "-f", str(self.data_dir / "embedline.password")])

    def dsn(self, dbname: str = DATABASE) -> str:
        """Return the connection URI of a database, with the superuser's password."""
        return f"postgresql://{SUPERUSER}:{self.password()}@{_HOST}:{self.port}/{quote(dbname, safe='')}"

    def password(self) -> str:
        try:
            return self.password_file.read_text().strip()
        except OSError as error:
            raise SetupError(
                f"there is no local cluster in {self.data_dir} ({error.strerror})\nRun: make up"
            ) from error

    def init(self) -> None:
        """Create the data directory, the superuser's password and the database."""
        if self.data_dir.exists() and any(self.data_dir.iterdir()):
            raise SetupError(
                f"{self.data_dir} is not empty and holds no finished cluster of Embedline\n"
                f"Remove it (make clean does), or name another with EMBEDLINE_PGDATA."
            )
        self.data_dir.mkdir(parents=True, exist_ok=True)
        user = server_user()
        if os.geteuid() == 0:
            os.chown(self.data_dir, user.pw_uid, user.pw_gid)
        self.data_dir.chmod(0o700)
        check_reachable([self.data_dir], "the cluster's data directory")
        self._run(
            [
                *(self._program("initdb"), "--pgdata", str(self.data_dir), "--username", SUPERUSER),
                *("--encoding", "UTF8", "--locale", "C.UTF-8", "--auth-local", "peer", "--auth-host", "reject"),
            ],
            "initdb",
        )
        self._write("pg_hba.conf", _HBA)
        self._write("pg_ident.conf", _ident_map(user.pw_name))
        with (self.data_dir / "postgresql.conf").open("a") as file:
            file.write("\ninclude 'embedline.conf'\n")
        self._write("embedline.conf", "")
        password = secrets.token_hex(16)
        # In single-user mode no argument shows the password, and pg_cron is not loaded yet. Its launcher would fail
        # every second until its database is there.
        self._run(
            [self._program("postgres"), "--single", "-D", str(self.data_dir), "template1"],
            "creating the database",
            stdin=f"ALTER ROLE {SUPERUSER} PASSWORD '{password}'\nCREATE DATABASE {DATABASE}\n",
            failure="ERROR:",
        )
        self._write("embedline.password", password + "\n")  # last: it marks the cluster as finished

    def start(self) -> None:
        """Start the server and wait until it takes connections; do nothing if it runs."""
        running = self.running_port()
        if running is not None:
            if running != self.port:
                raise SetupError(
                    f"the cluster in {self.data_dir} runs on port {running}, not {self.port}\n"
                    f"Run: make down, then make up; or set EMBEDLINE_PORT={running}"
                )
            return
        self._check_port_is_free()
        self._forget_foreign_postmaster()
        self._make_socket_dir()
        self._write("embedline.conf", self._configuration())
        start_log = self.data_dir / "start.log"
        command = [self._program("pg_ctl"), "start", "-w", "-t", str(_START_SECONDS), "-s", "-D", str(self.data_dir)]
        try:
            self._run([*command, "-l", str(start_log)], "starting the server")
        except SetupError as error:
            lines = [line for log in (start_log, self.log_file) if log.exists() for line in _tail(log)]
            raise SetupError("\n".join([str(error), *lines])) from error

    def is_moved(self) -> bool:
        """Return True if the server was started from another path than its present one."""
        try:
            lines = (self.data_dir / "embedline.conf").read_text().splitlines()
        except OSError:
            return False
        if any(line.startswith(_PATH_COMMENT) for line in lines):
            return f"{_PATH_COMMENT}{self.python_path}" not in lines
        # Written before that comment existed, with the socket in the data directory.
        return f"unix_socket_directories = '{self.socket_dir}'" not in lines

    def stop(self, mode: str = "fast") -> None:
        """Stop the server and wait until it is gone; do nothing if it does not run.

        Modes: smart, fast, immediate.
        """
        if self.running_port() is None:
            return
        self._run(
            [self._program("pg_ctl"), "stop", "-w", "-t", "60", "-s", "-m", mode, "-D", str(self.data_dir)],
            "stopping the server",
        )

    def kill(self) -> None:
        """Kill the postmaster and its children with SIGKILL, and wait until they are gone."""
        postmaster = self.postmaster_pid()
        if postmaster is None:
            return
        victims = [postmaster, *_children(postmaster)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _wait_until(lambda: not any(_is_alive(pid) for pid in victims), "the server's processes to end")
        try:
            _wait_until(lambda: not Path(f"/proc/{postmaster}").exists(), "the postmaster to be reaped", seconds=5.0)
        except SetupError:
            # The container's first process may not reap children, and to PostgreSQL a zombie looks like a running
            # postmaster.
            for lock in (self.data_dir / "postmaster.pid", self.socket_dir / f".s.PGSQL.{self.port}.lock"):
                lock.unlink(missing_ok=True)

    def postmaster_pid(self) -> int | None:
        """Return the process id of the running postmaster, or None."""
        lines = self._pid_file()
        if not lines or not lines[0].strip().isdecimal():
            return None
        pid = int(lines[0])
        return pid if _is_alive(pid) and self._is_our_postmaster(pid) else None

    def running_port(self) -> int | None:
        """Return the port on which this data directory's server runs, or None."""
        if self.postmaster_pid() is None:
            return None
        lines = self._pid_file()
        return int(lines[3]) if len(lines) > 3 and lines[3].strip().isdecimal() else None

    def remove(self) -> None:
        """Stop the server and delete its data."""
        self.stop("immediate")
        shutil.rmtree(self.data_dir, ignore_errors=True)
        if self.socket_dir != self.data_dir:
            shutil.rmtree(self.socket_dir, ignore_errors=True)

    def _pid_file(self) -> list[str]:
        try:
            return (self.data_dir / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []

    def _is_our_postmaster(self, pid: int) -> bool:
        """Return False for a stale postmaster.pid whose number another process has now."""
        try:
            return Path(f"/proc/{pid}/cwd").resolve(strict=True) == self.data_dir.resolve()
        except OSError:
            return False

    def _forget_foreign_postmaster(self) -> None:
        """Remove lock files of a server of another path.

        A copy of a running cluster contains them, and a moved server could not remove that of its socket. Only for a
        data directory in which no server runs.
        """
        for lock in (self.data_dir / "postmaster.pid", *self.data_dir.glob(".s.PGSQL.*")):
            lock.unlink(missing_ok=True)

    def _program(self, name: str) -> str:
        return str(self.bin_dir / name)

    def _run(self, command: Sequence[str], label: str, stdin: str = "", failure: str | None = None) -> None:
        done = subprocess.run(
            as_server_user(command),
            input=stdin,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment(),
            cwd="/",
            check=False,
        )
        if done.returncode != 0 or (failure is not None and failure in done.stdout):
            raise SetupError(f"{label} failed ({done.returncode})\n{done.stdout.strip()}")

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if _INHERITED.fullmatch(name)}
        return {
            **inherited,
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": server_user().pw_dir,
            "LANG": "C.UTF-8",
            "PYTHONPATH": self.python_path,
            "PYTHONDONTWRITEBYTECODE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OPENBLAS_NUM_THREADS": "1",
            **self.environment,
        }

    def _configuration(self) -> str:
        values = {**_SETTINGS, "port": str(self.port), "unix_socket_directories": str(self.socket_dir)}
        if self.cron_database is not None:
            values |= {**_CRON_SETTINGS, "cron.database_name": self.cron_database, "cron.host": str(self.socket_dir)}
        values |= self.settings
        lines = [f"{name} = '{value.replace(chr(39), chr(39) * 2)}'" for name, value in values.items()]
        return "\n".join(
            ["# written at every start by embedline.dev.cluster", f"{_PATH_COMMENT}{self.python_path}", *lines, ""]
        )

    def _write(self, name: str, text: str) -> None:
        path = self.data_dir / name
        path.touch(mode=0o600)
        path.chmod(0o600)
        path.write_text(text)
        if os.geteuid() == 0:
            user = server_user()
            os.chown(path, user.pw_uid, user.pw_gid)

    def _make_socket_dir(self) -> None:
        folder, user = self.socket_dir, server_user()
        if folder == self.data_dir:
            return
        try:
            folder.mkdir(mode=0o700)
            if os.geteuid() == 0:
                os.chown(folder, user.pw_uid, user.pw_gid)
        except FileExistsError:
            status = folder.lstat()
            if folder.is_symlink() or status.st_uid != user.pw_uid or status.st_mode & 0o077:
                raise SetupError(
                    f"{folder} belongs to another user or is open to others\nRemove it, then run: make up"
                ) from None

    def _check_port_is_free(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, self.port))
            except OSError as error:
                raise SetupError(
                    f"port {self.port} is in use ({error.strerror})\n"
                    f"Name another, for example: make up EMBEDLINE_PORT={self.port + 1}"
                ) from error


_HBA = """\
# written by embedline.dev.cluster
# TYPE  DATABASE         USER  ADDRESS       METHOD
local   all              all                 peer map=embedline
host    all              all   127.0.0.1/32  scram-sha-256
local   replication      all                 peer map=embedline
host    replication      all   127.0.0.1/32  scram-sha-256
"""


def _ident_map(server_user_name: str) -> str:
    lines = [f"embedline {server_user_name} {role}" for role in _IDENT_ROLES]
    if server_user_name != "root":
        lines.append(f"embedline root {SUPERUSER}")
    return "\n".join(["# MAP  OS-USER  ROLE", *lines, ""])


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError, ValueError):
                # The name in parentheses may hold anything; the fields after it are plain.
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(entry.name))
    return found


def _is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise SetupError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.02)


def _tail(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError:
        return []
