"""What is tried on a platform: the words of README.md and docs/how-to/, as root and as a user with sudo."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from embedline.dev.cluster.console import say
from platforms import container, operations
from platforms.folder import Folder, Room, copy, room
from platforms.table import Row

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("demo", "demo-upgrade", "test", "operations", "container", "removal")
USERS = ("root", "sudo")
_FAILURE_LINES = 30
# What README asks for.
_PREREQUISITES = ("git", "make", "python3")
# Root's home folder is closed to the server's OS user; README names /srv.
_CLONES = {"root": Path("/srv/embedline"), "sudo": Path("/home/newcomer/embedline")}
_ACCOUNTS = {"root": "root", "sudo": "newcomer"}
_VERSIONS = """
for server in /usr/lib/postgresql/*/bin/postgres; do "$server" --version; done | sed 's/.*PostgreSQL) /PostgreSQL /; s/ (.*//'
sed -n "s/^default_version = '\\(.*\\)'/pgvector \\1/p" /usr/share/postgresql/*/extension/vector.control
/usr/bin/python3 --version
"""
# The set-up's own things, and nothing else, are gone; the clone is as git made it.
_REMOVAL = """
make clean
left=$(git status --porcelain --ignored)
if [ -n "$left" ]; then echo "make clean left: $left"; exit 1; fi
"""


@dataclass(frozen=True)
class Attempt:
    """One user on one platform: a room with a clean clone in it."""

    room: Room
    base: Folder
    user: str
    port: int

    @property
    def account(self) -> str:
        return _ACCOUNTS[self.user]

    def run(self, step: str) -> Row:
        """Run one step and return its row; what it printed is in its log."""
        log = self.room.folder.path.parent / f"{self.user}-{step}.log"
        say(f"{step} as {self.user} (tail -f {log})")
        begin = time.monotonic()
        with log.open("wb") as output:
            command = self.command(self._script(step))
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False
            )
        seconds = time.monotonic() - begin
        lines = log.read_text(errors="replace").splitlines()
        if done.returncode != 0:
            print("\n".join(lines[-_FAILURE_LINES:]))
        installed = self.room.folder.size() - self.base.size()
        result = _result(done.returncode, lines)
        say(f"{step} as {self.user}: {result} after {seconds:.0f} s")
        return Row(self._platform(), self.user, step, result, f"{seconds:.0f}", f"{installed / 1e9:.2f} GB", head()[:7])

    def prepare(self) -> None:
        """Make the user, install what README asks for, and clone HEAD; an older clone keeps what was set up in it."""
        path = self.room.folder.path
        if not (path / "usr/bin/make").exists():
            packages = [*_PREREQUISITES, *(["sudo"] if self.user == "sudo" else [])]
            self._as_root("apt-get -q update && apt-get -q -y install --no-install-recommends " + " ".join(packages))
        if self.user == "sudo" and not (path / f"home/{self.account}").exists():
            self._as_root(f"useradd --create-home --shell /bin/bash {self.account}")
            (path / "etc/sudoers.d/newcomer").write_text(f"{self.account} ALL=(ALL) NOPASSWD: ALL\n")
        clone = path / _CLONES[self.user].relative_to("/")
        git = ["git", "-c", "safe.directory=*"]
        if not (clone / ".git").exists():
            subprocess.run([*git, "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)], check=True)
        subprocess.run([*git, "-C", str(clone), "fetch", "--quiet", str(ROOT), head()], check=True)
        subprocess.run([*git, "-C", str(clone), "checkout", "--quiet", "--force", "--detach", head()], check=True)
        # But for the cluster of a run before, which belongs to the server's user.
        folder = _CLONES[self.user]
        self._as_root(f"find {folder} -path {folder}/.postgres -prune -o -exec chown -h {self.account}: {{}} +")

    def shell(self) -> int:
        """Let a person work in the clone, as the user; return the shell's exit status."""
        return subprocess.run(self.command("exec bash -i"), check=False).returncode

    def command(self, script: str) -> list[str]:
        """Return what this machine runs so that the user runs the shell script in the clone."""
        environment = {"EMBEDLINE_PORT": str(self.port)}
        return self.room.command(
            ["bash", "-euo", "pipefail", "-c", f"cd {_CLONES[self.user]}\n{script}"], self.account, environment
        )

    def _as_root(self, script: str) -> None:
        self.room.capture(["sh", "-ec", f"export DEBIAN_FRONTEND=noninteractive; {script}"])

    def _script(self, step: str) -> str:
        if step == "removal":
            return _REMOVAL
        if step == "operations":
            return self._operations()
        if step == "container":
            return self._container()
        return f"make {step}"

    def _operations(self) -> str:
        """Put the page's script into the folder, and return how this user runs it as root."""
        offered = self.room.capture(["apt-cache", "search", "--names-only", "postgresql-[0-9]+-pgvector"])
        install, remove = (
            (ROOT / page).read_text(encoding="utf-8") for page in (operations.INSTALL, operations.REMOVE)
        )
        script = operations.script(install, remove, pgvector_package=bool(offered.strip()))
        (self.room.folder.path / "srv/operations.sh").write_text(script)
        # `make setup`: its models are used and, where Debian has no package of pgvector, the one that it builds.
        return f"make setup\n{'sudo' if self.user == 'sudo' else ''} bash /srv/operations.sh"

    def _container(self) -> str:
        """Put the steps of the Containerfile into the folder, if they are for this release."""
        text = (ROOT / container.FILE).read_text(encoding="utf-8")
        if self.room.folder.release.get("VERSION_CODENAME") != container.release(text):
            return f"echo 'the container is of {container.release(text)}'"
        (self.room.folder.path / "srv/container.sh").write_text(
            f"export PGPORT={_free_port()}\n{container.script(text)}"
        )
        # `make setup`: its models are used.
        return f"make setup\n{'sudo' if self.user == 'sudo' else ''} bash /srv/container.sh"

    def _platform(self) -> str:
        name = self.room.folder.release["PRETTY_NAME"].replace("GNU/Linux ", "")
        return ", ".join([name, *self.room.capture(["bash", "-c", _VERSIONS]).splitlines()])


@contextmanager
def attempt(base: Folder, user: str) -> Iterator[Attempt]:
    """Open a room for the user in the user's own copy of the release, with a clone of HEAD."""
    with room(copy(base, base.path.parent / user)) as opened:
        made = Attempt(opened, base, user, _free_port())
        made.prepare()
        yield made
        # After the last step only: an interrupted step holds the lock that `make down` would wait for, and the room ends it.
        subprocess.run(made.command("make down"), stdin=subprocess.DEVNULL, capture_output=True, check=False)


def head() -> str:
    """Return the commit that is tried."""
    return subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def _result(status: int, lines: list[str]) -> str:
    """Return the closing line of pytest where there is one, else whether the step passed."""
    counts = [line for line in lines if re.search(r"\d+ (passed|failed).* in [\d.]+s", line)]
    if counts:
        return re.sub(r"=+| in [\d.]+s.*|\|", "", counts[-1]).strip()
    return "passed" if status == 0 else f"failed ({status})"


def _free_port() -> int:
    # A room shares the machine's network.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
