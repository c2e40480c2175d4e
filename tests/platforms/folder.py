"""A Debian release in a folder: debootstrap makes it, a room of its own runs commands in it.

What the folder needs from the network (mirror, proxy, certificates, pip's index) is read from this machine's own apt and
pip at run time. A room is a mount, process and IPC namespace: what is mounted or started in it ends with it, even
when this process is killed. The machine's own clusters cannot be seen from a room; only its ports are shared.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from embedline.dev.cluster import pgvector, system
from embedline.dev.cluster.console import SetupError, capture, run_step

APT = Path("/etc/apt")
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# Settings of apt that say how to reach a mirror; the others are this machine's taste.
_APT_SETTINGS = re.compile(r"Acquire::(https?|Check-Valid-Until|Check-Date|Retries|ForceIPv[46])\b.*")
# Settings of pip that say how to reach an index; files of this machine are not among them, its certificates apart.
_PIP_SETTINGS = re.compile(
    r"(?:global|:env:)\.(proxy|index-url|extra-index-url|trusted-host|default-timeout|timeout|retries)='([^']*)'"
)
_PROXY_VARIABLE = re.compile(r"(https?|no|all)_proxy", re.IGNORECASE)
# The first process of a room. It lives until its standard input closes, with the process that holds the other end, and reaps.
_FIRST_PROCESS = """
mount --rbind /dev "$1/dev"
mount -t tmpfs -o mode=1777 tmpfs "$1/dev/shm"
mount -t proc proc "$1/proc"
mount -t sysfs -o ro sysfs "$1/sys"
exec chroot "$1" /bin/sh -c 'echo ready; cat >/dev/null; exit 0'
"""


@dataclass(frozen=True)
class Folder:
    """A Debian release in a folder of this machine."""

    path: Path

    @property
    def release(self) -> dict[str, str]:
        """The fields of its /etc/os-release."""
        lines = (self.path / "etc" / "os-release").read_text().splitlines()
        return {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}

    def size(self) -> int:
        """Return the bytes on disk, downloads that apt and pip keep left out."""
        # In a room other processes come and go under /tmp and /var: du's complaint about those is no failure.
        du = ["du", "--summarize", "--one-file-system", "--block-size=1", "--exclude=var/cache/apt", "--exclude=.cache"]
        done = subprocess.run([*du, "."], cwd=self.path, capture_output=True, text=True, check=False)
        return int(done.stdout.split()[0])


def make_base(path: Path, suite: str) -> Folder:
    """Return the untouched release in this folder, made by debootstrap unless it is there."""
    if not (path / "finished").exists():
        if not shutil.which("debootstrap"):
            raise SetupError("debootstrap is not installed\nRun: apt-get install debootstrap")
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        options = ["--variant=minbase", "--include=ca-certificates"]
        run_step(f"Making Debian {suite} in {path}", ["debootstrap", *options, suite, str(path), mirror().uris])
        _copy_network_settings(path, suite)
        (path / "finished").touch()
    return Folder(path)


def mirror() -> pgvector.AptSource:
    """Return this machine's own entry for Debian's main archive."""
    source = pgvector.distribution_source(APT, system.os_release().get("VERSION_CODENAME", ""))
    if source is None or system.os_release().get("ID") != "debian":
        raise SetupError(f"{APT} names no mirror of Debian\nRun this on Debian.")
    return source


def copy(base: Folder, path: Path) -> Folder:
    """Return a copy of the untouched release in this folder, unless there is one."""
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        run_step(f"Copying {base.path} to {path}", ["cp", "-a", str(base.path), str(unfinished)])
        unfinished.rename(path)
    return Folder(path)


def _copy_network_settings(path: Path, suite: str) -> None:
    """Let apt and pip in the folder reach what they reach on this machine."""
    for name in ("resolv.conf", "hosts"):
        shutil.copy(Path("/etc") / name, path / "etc" / name)
    (path / "etc/apt/sources.list").unlink(missing_ok=True)
    (path / "etc/apt/sources.list.d/debian.sources").write_text(_sources(suite))
    settings = [line for line in capture(["apt-config", "dump"]).splitlines() if _APT_SETTINGS.fullmatch(line)]
    (path / "etc/apt/apt.conf.d/90machine").write_text("\n".join([*settings, ""]))
    (path / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n")  # the folder can be made again
    if _CERTIFICATES.exists():
        local = path / "usr/local/share/ca-certificates"
        local.mkdir(parents=True, exist_ok=True)
        shutil.copy(_CERTIFICATES, local / "machine.crt")
        run_step("Adding this machine's certificates", ["chroot", str(path), "update-ca-certificates"])
    pip = shutil.which("pip") or shutil.which("pip3")
    settings = _PIP_SETTINGS.findall(capture([pip, "config", "list"])) if pip else []
    lines = [f"{name} = {value}" for name, value in settings if "file:" not in value]
    (path / "etc/pip.conf").write_text("\n".join(["[global]", f"cert = {_CERTIFICATES}", *lines, ""]))


def _sources(suite: str) -> str:
    """Return this machine's sources of Debian, for another release."""
    own = system.os_release()["VERSION_CODENAME"]
    stanzas = []
    for file in [APT / "sources.list", *sorted((APT / "sources.list.d").glob("*"))]:
        if file.suffix not in {".list", ".sources"} or not file.is_file():
            continue
        parse = pgvector.parse_deb822 if file.suffix == ".sources" else pgvector.parse_one_line
        for source in parse(file.read_text()):
            suites = [name.replace(own, suite) for name in source.suites if name.startswith(own)]
            if suite == "sid":  # has neither updates nor a security suite of its own
                suites = [name for name in suites if name == suite]
            if suites and "main" in source.components:
                keyring = "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg"
                stanza = [
                    "Types: deb",
                    f"URIs: {source.uris}",
                    f"Suites: {' '.join(suites)}",
                    "Components: main",
                    keyring,
                ]
                stanzas.append("\n".join([*stanza, ""]))
    return "\n".join(stanzas)


class Room:
    """Runs commands in a folder, with its own processes, mounts and shared memory."""

    def __init__(self, folder: Folder, first_process: int) -> None:
        self.folder = folder
        self._first_process = first_process

    def command(
        self, words: Sequence[str], user: str = "root", environment: Mapping[str, str] | None = None
    ) -> list[str]:
        """Return what this machine runs so that the user runs the words in the room, with the environment of a new login."""
        enter = ["nsenter", f"--target={self._first_process}", "--mount", "--pid", "--ipc", "--root", "--wd"]
        proxies = {name: value for name, value in os.environ.items() if _PROXY_VARIABLE.fullmatch(name)}
        variables = {
            "HOME": "/root" if user == "root" else f"/home/{user}",
            "USER": user,
            "LOGNAME": user,
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "TERM": "dumb",
            **proxies,
            **(environment or {}),
        }
        become = ["runuser", "-u", user, "--"] if user != "root" else []
        return [*enter, *become, "env", "-i", *(f"{name}={value}" for name, value in variables.items()), *words]

    def capture(self, words: Sequence[str], user: str = "root") -> str:
        """Run a short command and return what it wrote."""
        return capture(self.command(words, user))


@contextmanager
def room(folder: Folder) -> Iterator[Room]:
    """Open a room in the folder; what runs there when the block ends is killed, what is mounted goes."""
    unshare = ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "sh", "-ec", _FIRST_PROCESS, "sh"]
    holder = subprocess.Popen(
        [*unshare, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for us, who close the room
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        if holder.stdout.readline().strip() != "ready":
            raise SetupError(
                f"a room in {folder.path} cannot be opened\nRun as root, outside of a restricted container."
            )
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        yield Room(folder, int(children[0]))
    finally:
        holder.stdin.close()
        try:
            holder.wait(timeout=10)
        except subprocess.TimeoutExpired:
            holder.kill()  # its child goes with it
            holder.wait()
