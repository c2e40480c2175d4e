"""Install system packages: PostgreSQL, PL/Python, pg_cron, the manual.

Compilers are installed only if pgvector is built.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from embedline.dev.cluster.console import SetupError, as_root, capture, run_step, say

OLDEST_MAJOR, NEWEST_MAJOR = 15, 18
_SERVERS = Path("/usr/lib/postgresql")
# Browsers that the tests of pages can drive, and the packages of the same names; the first is the smaller one.
BROWSERS = ("chromium-headless-shell", "chromium")
# The emoji and icons of make demo-images.
PICTURES = ("fonts-noto-color-emoji", "adwaita-icon-theme")
_NO_MAIN_CLUSTER = Path("/etc/postgresql-common/createcluster.d/embedline.conf")


def bin_dir(major: int) -> Path:
    """Return the folder of a server's programs."""
    return _SERVERS / str(major) / "bin"


def pg_config(major: int, option: str) -> Path:
    """Return a path that pg_config knows, for example pg_config(15, "sharedir")."""
    return Path(capture([str(bin_dir(major) / "pg_config"), f"--{option}"]).strip())


def manual_dir(major: int) -> Path:
    """Return the folder of the manual's HTML pages."""
    return Path(f"/usr/share/doc/postgresql-doc-{major}/html")


def os_release() -> dict[str, str]:
    """Read /etc/os-release."""
    pairs = (line.partition("=") for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return {key: value.strip('"') for key, _, value in pairs}


def choose_major(data_dir: Path) -> int:
    """Return the PostgreSQL major version to use.

    It is the data directory's own if there is one, else the newest supported server installed, else the distribution's.
    """
    version_file = data_dir / "PG_VERSION"
    try:
        return int(version_file.read_text())
    except (FileNotFoundError, PermissionError, ValueError):
        pass
    installed = [int(path.parts[-3]) for path in _SERVERS.glob("[0-9]*/bin/postgres")]
    supported = [major for major in installed if OLDEST_MAJOR <= major <= NEWEST_MAJOR]
    return max(supported) if supported else _distribution_major()


def _distribution_major() -> int:
    if not candidate("postgresql"):
        update_lists()
    match = re.search(r"Depends: postgresql-(\d+)", capture(["apt-cache", "depends", "postgresql"]))
    if match is None:
        raise SetupError("apt knows no PostgreSQL server\nCheck /etc/apt/sources.list.d, then run make again.")
    major = int(match.group(1))
    if not OLDEST_MAJOR <= major <= NEWEST_MAJOR:
        raise SetupError(
            f"this distribution offers PostgreSQL {major}; Embedline needs {OLDEST_MAJOR} to {NEWEST_MAJOR}\n"
            f"Install one from the PostgreSQL project's apt repository, for example postgresql-17, then run make again."
        )
    return major


def candidate(package: str) -> str | None:
    """Return the version that apt would install, or None."""
    match = re.search(r"^  Candidate: (.+)$", capture(["apt-cache", "policy", package]), re.MULTILINE)
    return None if match is None or match.group(1) == "(none)" else match.group(1)


@functools.cache
def update_lists() -> None:
    """Refresh apt's package lists, once per run."""
    run_step("Refreshing apt's package lists", as_root(["apt-get", "-q", "update"]))


def install(label: str, packages: Iterable[str], *options: str) -> None:
    """Install packages without questions."""
    quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y", "-o", "Dpkg::Use-Pty=0"]
    run_step(label, as_root([*quiet, *options, "install", "--no-install-recommends", *packages]))


def missing(packages: Iterable[str]) -> list[str]:
    """Return those packages that are not installed."""
    return [name for name in packages if not _is_installed(name)]


def _is_installed(package: str) -> bool:
    query = ["dpkg-query", "-W", "-f=${db:Status-Status}", package]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout == "installed"


def required_packages(major: int) -> list[str]:
    """Return Embedline's packages from apt, except pgvector."""
    return [
        f"postgresql-{major}",
        f"postgresql-plpython3-{major}",
        f"postgresql-{major}-cron",
        f"postgresql-doc-{major}",
        "python3-venv",
    ]


def ensure_build_packages() -> None:
    """Install the tools that build pgvector, which is written in C."""
    absent = missing(["gcc", "libc6-dev", "make", "dpkg-dev"])
    if absent:
        update_lists()
        install(f"Installing what builds pgvector: {' '.join(absent)}", absent)


def ensure_packages(major: int) -> None:
    """Install the missing system packages; leave the machine's own clusters alone."""
    if not Path("/usr/bin/apt-get").exists():
        raise SetupError("the set-up needs Debian's apt-get; on another system see README.md, “In a database of yours”")
    absent = missing(required_packages(major))
    if absent:
        update_lists()
        guarded = f"postgresql-{major}" in absent
        if guarded:
            _write_as_root(_NO_MAIN_CLUSTER, "create_main_cluster = false\n")
        try:
            install(f"Installing system packages: {' '.join(absent)}", absent)
        finally:
            if guarded:
                subprocess.run(as_root(["rm", "-f", str(_NO_MAIN_CLUSTER)]), check=True)
    else:
        say(f"System packages are installed (PostgreSQL {major})")
    _ensure_manual(major)


def ensure_browser() -> None:
    """Install a browser for the tests of pages.

    Without the rights of root, or a package, they are skipped.
    """
    if any(shutil.which(name) for name in BROWSERS):
        say("A browser is installed")
        return
    if os.geteuid() != 0 and subprocess.run(["sh", "-c", "sudo -n true"], capture_output=True, check=False).returncode:
        say("No browser is installed: tests of pages are skipped (as root, make test installs one)")
        return
    update_lists()
    package = next((name for name in BROWSERS if candidate(name)), None)
    if package is None:
        say("apt knows no browser: tests of pages are skipped")
    else:
        install(f"Installing a browser for the tests of pages: {package}", [package])


def ensure_pictures() -> None:
    """Install the packages with the demo's emoji and icons."""
    absent = missing(PICTURES)
    if absent:
        update_lists()
        install(f"Installing the emoji and icons of the demo: {' '.join(absent)}", absent)
    else:
        say("The emoji and icons are installed")


def _ensure_manual(major: int) -> None:
    """Install the pages of the manual if dpkg left them out.

    Container images often tell dpkg to leave out /usr/share/doc; the demo reads the manual there.
    """
    if (manual_dir(major) / "bookindex.html").exists():
        return
    package = f"postgresql-doc-{major}"
    update_lists()
    install(
        f"Installing the pages of {package} that this machine's dpkg leaves out",
        [package],
        "--reinstall",
        "-o",
        f"Dpkg::Options::=--path-include=/usr/share/doc/{package}/*",
    )


def _write_as_root(path: Path, text: str) -> None:
    subprocess.run(as_root(["mkdir", "-p", str(path.parent)]), check=True)
    subprocess.run(as_root(["tee", str(path)]), input=text, text=True, stdout=subprocess.DEVNULL, check=True)
