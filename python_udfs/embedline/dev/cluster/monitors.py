"""Unpack Debian's Prometheus, Alertmanager and PgBouncer for the tests.

They lie in the checkout and are not installed, because their packages start services. Only Alertmanager's templates
go to their place in the system, because Debian's build looks for them nowhere else.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from embedline.dev.cluster import system
from embedline.dev.cluster.console import as_root, run_step, say
from embedline.dev.cluster.settings import Settings

# In Debian 12 promtool is a part of prometheus, from 13 on a package of its own.
_PACKAGES = ("prometheus", "promtool", "prometheus-alertmanager", "pgbouncer")
# Libraries that PgBouncer needs, by their names in Debian 12 and 13.
_LIBRARIES = ("libc-ares2", "libcares2", "libevent-2.1-7", "libevent-2.1-7t64")
# The programs of these packages that the tests run.
PROGRAMS = ("prometheus", "promtool", "prometheus-alertmanager", "amtool", "pgbouncer")

_TEMPLATES = Path("/usr/share/prometheus/alertmanager")


def program(settings: Settings, name: str) -> Path:
    """Return the path of a program."""
    place = "sbin" if name == "pgbouncer" else "bin"
    return _folder(settings) / "usr" / place / name


def library_path(settings: Settings) -> str:
    """Return the folders of the unpacked libraries, as LD_LIBRARY_PATH has them."""
    return ":".join(sorted({str(path.parent) for path in _folder(settings).rglob("lib*.so.*")}))


def _folder(settings: Settings) -> Path:
    return settings.root / ".cache" / "monitors"


def ensure_monitors(settings: Settings) -> None:
    """Download and unpack what is missing."""
    target = _folder(settings)
    if all(program(settings, name).exists() for name in PROGRAMS):
        say("Prometheus, Alertmanager and PgBouncer are unpacked")
    else:
        _unpack(settings, target)
    if not _TEMPLATES.exists():
        run_step("Copying Alertmanager's templates", as_root(["mkdir", "-p", str(_TEMPLATES.parent)]))
        run_step(f"  to {_TEMPLATES}", as_root(["cp", "-r", f"{target}{_TEMPLATES}", str(_TEMPLATES)]))


def _unpack(settings: Settings, target: Path) -> None:
    if not system.candidate(_PACKAGES[0]):
        system.update_lists()
    packages = [name for name in (*_PACKAGES, *_LIBRARIES) if system.candidate(name)]
    downloads = settings.root / ".cache" / "downloads"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    run_step(f"Downloading {', '.join(packages)}", ["apt-get", "-q", "download", *packages], cwd=downloads)
    for package in sorted(downloads.glob("*.deb")):
        run_step(f"Unpacking {package.name.partition('_')[0]}", ["dpkg", "-x", str(package), str(target)])
    shutil.rmtree(downloads)
