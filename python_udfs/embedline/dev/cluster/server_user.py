"""Find the OS user that the server runs as, and the folders that it can enter."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Sequence
from pathlib import Path

from embedline.dev.cluster.console import SetupError

# The OS user that Debian's package creates.
_SERVER_USER = "postgres"


def server_user() -> pwd.struct_passwd:
    """Return the OS user that runs the server.

    It is `postgres` if root starts it, else the user who starts it.
    """
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    try:
        return pwd.getpwnam(_SERVER_USER)
    except KeyError:
        raise SetupError("there is no OS user postgres; the server's package creates it\nRun: make setup") from None


def _coming_server_user() -> pwd.struct_passwd:
    """Return the OS user that will run the server.

    Before its package is installed, an unprivileged user stands for `postgres`.
    """
    try:
        return server_user()
    except SetupError:
        return pwd.getpwnam("nobody")


def as_server_user(command: Sequence[str], user: pwd.struct_passwd | None = None) -> list[str]:
    """Return the command so that it runs as the server's OS user."""
    if os.geteuid() != 0:
        return list(command)
    user = user or server_user()
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups", "--", *command]


def as_server_user_ok(command: Sequence[str]) -> bool:
    return subprocess.run(as_server_user(command), cwd="/", stdin=subprocess.DEVNULL, check=False).returncode == 0


# Prints the first path component or file that cannot be read, and nothing if all can be.
_PROBE = """
import os, sys
def check(path, mode):
    if os.path.lexists(path) and not os.access(path, mode):
        sys.exit(path)
for top in sys.argv[2:]:
    parts = top.split("/")
    for i in range(2, len(parts) + 1):
        component = "/".join(parts[:i])
        if not os.access(component, os.F_OK | (os.X_OK if os.path.isdir(component) else os.R_OK)):
            sys.exit(component)
    if sys.argv[1] == "deep":
        for folder, folders, files in os.walk(top):
            folders[:] = [name for name in folders if name != "__pycache__"]  # an unreadable cache is passed over
            check(folder, os.R_OK | os.X_OK)
            for name in files:
                check(os.path.join(folder, name), os.R_OK)
"""


def check_place(root: Path, source: Path, data_dir: Path) -> None:
    """Refuse a checkout that the server's OS user could not read.

    The check comes before anything is installed.
    """
    existing = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    check_reachable([root], "the checkout")
    check_reachable([source], "the checkout", deep=True)
    # An existing cluster belongs to its server's user.
    if existing != data_dir:
        check_reachable([existing], "the folder of the cluster's data directory")


def check_reachable(paths: Sequence[Path], what: str, *, deep: bool = False) -> None:
    """Refuse paths that the server's OS user cannot read.

    The error names the very component that is closed to it.
    """
    user = _coming_server_user()
    probe = ["/usr/bin/python3", "-I", "-c", _PROBE, "deep" if deep else "shallow", *(str(path) for path in paths)]
    done = subprocess.run(
        as_server_user(probe, user), cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return
    closed = (done.stderr.strip().splitlines() or ["?"])[-1]
    raise SetupError(
        f'the OS user "{_SERVER_USER if os.geteuid() == 0 else user.pw_name}", which runs the server, cannot read {what}:'
        f" {closed} is closed to it\n"
        f"Either open it:  chmod o+rX {closed}\n"
        f"or clone Embedline where everybody may read, for example under /srv or /opt"
        f" (EMBEDLINE_PGDATA=… moves only the cluster's data)."
    )
