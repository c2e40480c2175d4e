"""Install pgvector from the distribution's package, else build it from source.

The source is the distribution's newer source package.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from embedline.dev.cluster import headers, system
from embedline.dev.cluster.console import SetupError, as_root, run_step, say

MINIMUM = (0, 8, 0)
_SOURCE_SUITE = "trixie"  # the first Debian release with a source package of pgvector 0.8.0
_APT_SOURCES = Path("/etc/apt")


def version_tuple(text: str) -> tuple[int, ...]:
    """Return the numbers of a version: "0.8.0-1" → (0, 8, 0).

    An epoch and a Debian revision are left out.
    """
    upstream = text.strip().split(":")[-1].split("-")[0].split("+")[0]
    return tuple(int(number) for number in re.findall(r"\d+", upstream))


def installed_version(major: int) -> str | None:
    """Return the version of pgvector that this server would create, or None."""
    control = system.pg_config(major, "sharedir") / "extension" / "vector.control"
    library = system.pg_config(major, "pkglibdir") / "vector.so"
    if not control.exists() or not library.exists():
        return None
    match = re.search(r"^\s*default_version\s*=\s*'([^']+)'", control.read_text(), re.MULTILINE)
    return match.group(1) if match else None


def ensure_pgvector(major: int) -> None:
    """Install pgvector 0.8.0 or newer for this server, unless it is there."""
    present = installed_version(major)
    if present is None:
        package = f"postgresql-{major}-pgvector"
        offered = system.candidate(package)
        if offered is not None and version_tuple(offered) >= MINIMUM:
            system.update_lists()
            system.install(f"Installing {package}", [package])
        else:
            _build(major)
        present = installed_version(major)
    if present is None or version_tuple(present) < MINIMUM:
        raise SetupError(
            f"pgvector {present or ''} is too old for Embedline, which needs 0.8.0 or newer\n"
            f"Remove {system.pg_config(major, 'sharedir') / 'extension' / 'vector.control'} "
            f"or its package, then run make again."
        )
    say(f"pgvector {present} is installed")


@dataclass(frozen=True)
class AptSource:
    """One entry of the machine's apt sources.

    It has the fields that a source package of another suite needs.
    """

    uris: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str | None

    def as_deb_src(self, suite: str) -> str:
        """Return the entry in deb822 form for the source packages of another suite."""
        lines = ["Types: deb-src", f"URIs: {self.uris}", f"Suites: {suite}", "Components: main"]
        if self.signed_by:
            lines.append(f"Signed-By: {self.signed_by}")
        return "\n".join(lines) + "\n"


def parse_deb822(text: str) -> list[AptSource]:
    """Read a .sources file.

    A Signed-By that holds a whole key keeps its continuation lines.
    """
    sources = []
    for stanza in re.split(r"\n\s*\n", re.sub(r"^#.*\n?", "", text, flags=re.MULTILINE)):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1].isspace() and name:
                fields[name] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get("enabled", "yes").lower() in {"no", "false", "0"} or "uris" not in fields:
            continue
        sources.append(
            AptSource(
                uris=" ".join(fields["uris"].split()),
                suites=tuple(fields.get("suites", "").split()),
                components=tuple(fields.get("components", "").split()),
                signed_by=fields.get("signed-by"),
            )
        )
    return sources


def parse_one_line(text: str) -> list[AptSource]:
    """Read a sources.list file."""
    sources = []
    for line in text.splitlines():
        match = re.match(r"\s*deb(?:-src)?\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line)
        if match is None:
            continue
        options, uri, suite, components = match.groups()
        signed_by = re.search(r"signed-by=(\S+)", options or "")
        sources.append(
            AptSource(
                uri, (suite,), tuple(components.split()), signed_by.group(1).replace(",", " ") if signed_by else None
            )
        )
    return sources


def distribution_source(folder: Path, codename: str) -> AptSource | None:
    """Return the machine's own entry for its distribution's main component."""
    files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    for path in files:
        if path.suffix not in {".list", ".sources"} or not path.is_file():
            continue
        parse = parse_deb822 if path.suffix == ".sources" else parse_one_line
        for source in parse(path.read_text()):
            if codename in source.suites and "main" in source.components:
                return source
    return None


def _build(major: int) -> None:
    """Build pgvector from the source suite with an apt state of its own.

    The machine's sources stay as they are.
    """
    release = system.os_release()
    source = distribution_source(_APT_SOURCES, release.get("VERSION_CODENAME", ""))
    if release.get("ID") != "debian" or source is None:
        raise SetupError(
            f"apt offers no postgresql-{major}-pgvector, and only Debian offers its source package\n"
            f"Install pgvector 0.8.0 or newer for PostgreSQL {major}, then run make again."
        )
    as_root(["make", "install"])  # without root it would fail at the very end
    system.ensure_build_packages()
    with tempfile.TemporaryDirectory(prefix="embedline-pgvector-") as name:
        folder = Path(name)
        apt_get = _private_apt_get(folder, source)
        run_step(f"Reading Debian {_SOURCE_SUITE}'s source packages", [*apt_get, "update"])
        run_step("Downloading the source of pgvector", [*apt_get, "source", "--download-only", "pgvector"], cwd=folder)
        description = next(folder.glob("pgvector_*.dsc"))
        version = description.stem.partition("_")[2]
        if version_tuple(version) < MINIMUM:
            raise SetupError(f"Debian {_SOURCE_SUITE} offers pgvector {version}; Embedline needs 0.8.0 or newer")
        tree = folder / "pgvector"
        run_step(f"Unpacking pgvector {version}", ["dpkg-source", "-x", str(description), str(tree)], cwd=folder)
        # OPTFLAGS="", because -march=native would tie the library to this very processor.
        make = ["make", "-C", str(tree), "OPTFLAGS=", f"PG_CONFIG={system.bin_dir(major) / 'pg_config'}"]
        make += _server_headers(major, folder)
        environment = {
            key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
        }
        run_step(f"Building pgvector {version}", [*make, f"-j{os.cpu_count() or 1}"], env=environment)
        run_step(f"Installing pgvector {version}", as_root([*make, "install"]), env=environment)


def _server_headers(major: int, folder: Path) -> list[str]:
    """Return make's arguments for the server's headers.

    If their package is not installed, they are unpacked.
    """
    installed = system.pg_config(major, "includedir-server")
    if (installed / "postgres.h").exists():
        return ["with_llvm=no"]
    unpacked = folder / "headers"
    unpacked.mkdir()
    return ["with_llvm=no", f"includedir_server={headers.unpack(major, unpacked)}"]


def _private_apt_get(folder: Path, source: AptSource) -> list[str]:
    sources = folder / "embedline.sources"
    sources.write_text(source.as_deb_src(_SOURCE_SUITE))
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    options = {
        "Dir::Etc::sourcelist": str(sources),
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": str(lists),
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Sandbox::User": "",
    }
    return ["apt-get", "-q", *(part for key, value in options.items() for part in ("-o", f"{key}={value}"))]
