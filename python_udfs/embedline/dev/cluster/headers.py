"""Unpack the headers of PostgreSQL's server, for what is built here in C.

Their package is not installed, because it depends on LLVM and its development files: 700 MB on Debian 12.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from embedline.dev.cluster import system
from embedline.dev.cluster.console import SetupError, run_step, say
from embedline.dev.cluster.settings import Settings


def server_headers(settings: Settings, major: int) -> Path | None:
    """Return the folder of the installed headers or of the unpacked ones, or None."""
    installed = system.pg_config(major, "includedir-server")
    unpacked = _folder(settings, major) / installed.relative_to("/")
    return next((folder for folder in (installed, unpacked) if (folder / "postgres.h").exists()), None)


def ensure_headers(settings: Settings, major: int) -> None:
    """Unpack the headers into the checkout, unless some are there.

    The tests build a library with them, which imports the package once for all sessions. They run without it if apt
    offers no headers.
    """
    if server_headers(settings, major) is not None:
        say(f"The headers of PostgreSQL {major} are there")
        return
    folder = _folder(settings, major)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        unpack(major, folder)
    except SetupError as error:
        say(f"Sessions of the tests begin more slowly without the headers of PostgreSQL {major}: {error}")


def unpack(major: int, folder: Path) -> Path:
    """Download and unpack the headers; return their folder."""
    package = f"postgresql-server-dev-{major}"
    if not system.candidate(package):
        system.update_lists()
    download = ["apt-get", "-q", "-o", "APT::Sandbox::User=", "download", package]
    run_step(f"Downloading {package}", download, cwd=folder)
    (archive,) = folder.glob(f"{package}_*.deb")
    run_step(f"Unpacking {package}", ["dpkg-deb", "-x", str(archive), str(folder)])
    archive.unlink()
    return folder / system.pg_config(major, "includedir-server").relative_to("/")


def _folder(settings: Settings, major: int) -> Path:
    return settings.root / ".cache" / f"headers-{major}"
