"""Check the installed parts: PL/Python, pgvector, and the server's package."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from pathlib import PurePosixPath

import embedline
from embedline.client.doctor.server import Finding, Server

_MINIMUM_PGVECTOR = (0, 8, 0)
_PGVECTOR_BUGS = (
    (
        (0, 8, 2),
        "parallel HNSW builds by hand overflow a buffer with maintenance_work_mem of 3 to 4 MB (CVE-2026-3172)",
    ),
    ((0, 8, 3), "VACUUM may corrupt an HNSW index"),
    ((0, 8, 4), "an HNSW graph damaged by deletes is not repaired"),
)


def plpython(server: Server) -> Iterator[Finding]:
    """Check that plpython3u is there."""
    if server.offered("plpython3u") is None:
        package = f"apt-get install postgresql-plpython3-{server.major}"
        yield Finding("plpython3u", "error", "missing", "On Debian:", (package,))
    elif (installed := server.installed("plpython3u")) is None:
        yield Finding("plpython3u", "ok", "available; embedline upgrade installs it")
    else:
        yield Finding("plpython3u", "ok", installed)


def pgvector(server: Server) -> Iterator[Finding]:
    """Check that pgvector is there, new enough, and without known bugs."""
    installed, offered = server.installed("vector"), server.offered("vector")
    version = installed or offered
    if version is None:
        advice = "Debian 13 and PostgreSQL's own packages (PGDG) have it; else build 0.8.0 or newer from source."
        package = f"apt-get install postgresql-{server.major}-pgvector"
        yield Finding("pgvector", "error", "missing", advice, (package,))
        return
    update = ("ALTER EXTENSION vector UPDATE;",) if installed and _is_older(installed, offered) else ()
    if version_number(version) < _MINIMUM_PGVECTOR:
        advice = "Embedline needs 0.8.0 or newer: iterative scans came with it."
        yield Finding("pgvector", "error", version, advice, update)
        return
    found = f"{installed} here, {offered} on the server" if update else version
    bugs = [(fixed, bug) for fixed, bug in _PGVECTOR_BUGS if version_number(version) < fixed]
    if bugs:
        newest = ".".join(map(str, bugs[-1][0]))
        advice = (
            f"Known bugs, fixed with {newest}: {'; '.join(bug for _, bug in bugs)}."
            " Your distribution may have mended them in its package; PGDG has a newer one."
        )
        yield Finding("pgvector", "warning", found, advice, update)
    elif update:
        yield Finding("pgvector", "note", found, "The newer one is on the server already.", update)
    else:
        yield Finding("pgvector", "ok", found)


def package(server: Server) -> Iterator[Finding]:
    """Check that the server's Python finds this very package."""
    inside = server.inside
    if "version" in inside:
        found = f"{inside['version']} in {inside['folder']}"
        if inside["version"] == embedline.__version__:
            yield Finding("Python package", "ok", found)
        else:
            advice = f"The client's package is {embedline.__version__}. Install one version for both, then restart the server."
            yield Finding("Python package", "error", found, advice)
    elif "missing" in inside:
        advice = (
            f"It is interpreter {inside['python']} of {inside['prefix']}, and looks in {', '.join(inside['path'])}."
            " Have the server start with PYTHONPATH naming the folder into which the package was installed."
        )
        found = f"the server's Python cannot import embedline: {inside['missing']}"
        yield Finding("Python package", "error", found, advice, _python_path(server))


def _python_path(server: Server) -> tuple[str, ...]:
    """Return the commands that set PYTHONPATH for a cluster of Debian's tools.

    There are none for other servers.
    """
    file = PurePosixPath(str(server.scalar("SHOW config_file")))
    if file.parts[:3] != ("/", "etc", "postgresql"):
        return ()
    line = f"PYTHONPATH = '{sysconfig.get_path('purelib')}'"
    version, cluster = file.parts[3:5]
    return (f'echo "{line}" >> {file.parent}/environment', f"pg_ctlcluster {version} {cluster} restart")


def _is_older(version: str, other: str | None) -> bool:
    return other is not None and version_number(version) < version_number(other)


def version_number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("-")[0]))
