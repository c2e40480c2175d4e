"""Unpack Debian's Prometheus and Alertmanager into the checkout, for the tests.

They are not installed, because their packages start services. Only Alertmanager's templates go to their place in the
system, because Debian's build looks for them nowhere else.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from embedline.dev.cluster import system
from embedline.dev.cluster.console import as_root, run_step, say
from embedline.dev.cluster.settings import Settings

# In Debian 12 promtool is a part of prometheus, from 13 on a package of its own.
_PACKAGES = ("prometheus", "promtool", "prometheus-alertmanager")
# The programs of these packages that the tests run.
PROGRAMS = ("prometheus", "promtool", "prometheus-alertmanager", "amtool")

_TEMPLATES = Path("/usr/share/prometheus/alertmanager")


def folder(settings: Settings) -> Path:
    """Return the folder of the programs."""
    return settings.root / ".cache" / "monitors" / "usr" / "bin"


def ensure_monitors(settings: Settings) -> None:
    """Download and unpack what is missing."""
    target = settings.root / ".cache" / "monitors"
    if all((folder(settings) / name).exists() for name in PROGRAMS):
        say("Prometheus and Alertmanager are unpacked")
    else:
        _unpack(settings, target)
    if not _TEMPLATES.exists():
        run_step("Copying Alertmanager's templates", as_root(["mkdir", "-p", str(_TEMPLATES.parent)]))
        run_step(f"  to {_TEMPLATES}", as_root(["cp", "-r", f"{target}{_TEMPLATES}", str(_TEMPLATES)]))


def _unpack(settings: Settings, target: Path) -> None:
    if not system.candidate(_PACKAGES[0]):
        system.update_lists()
    packages = [name for name in _PACKAGES if system.candidate(name)]
    downloads = settings.root / ".cache" / "downloads"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    run_step(f"Downloading {', '.join(packages)}", ["apt-get", "-q", "download", *packages], cwd=downloads)
    for package in sorted(downloads.glob("*.deb")):
        run_step(f"Unpacking {package.name.partition('_')[0]}", ["dpkg", "-x", str(package), str(target)])
    shutil.rmtree(downloads)
