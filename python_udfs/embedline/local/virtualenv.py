"""The virtual environment: of the very Python that the server's PL/Python links, so that the server can use it."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

from embedline.local import system
from embedline.local.console import SetupError, capture, run_step, say
from embedline.local.settings import Settings

# A plain `torch` can pull gigabytes of CUDA libraries; of this version the CPU build is taken where one is offered.
# Where it cannot be had, the lower bound of the `local` extra decides.
_TORCH = "torch==2.13.0"
_EXTRAS = "local,dev"


def linked_python(major: int) -> str:
    """Return the Python version, for example "3.11", that the server's PL/Python is linked with."""
    library = system.pg_config(major, "pkglibdir") / "plpython3.so"
    match = re.search(r"libpython(3\.\d+)", capture(["ldd", str(library)]))
    if match is None:
        raise SetupError(f"{library} is linked with no libpython; Embedline needs PL/Python 3")
    return match.group(1)


def ensure_virtualenv(settings: Settings, major: int) -> None:
    """Create the environment and install the package into it, unless that was done for this very pyproject.toml."""
    version = linked_python(major)
    stamp = settings.venv / "embedline.stamp"
    fingerprint = _fingerprint(settings, version)
    if stamp.is_file() and stamp.read_text() == fingerprint and settings.python.exists():
        say(f"The virtual environment is up to date (Python {version})")
        return
    _create(settings, version)
    pip = [str(settings.python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    try:
        run_step(f"Installing {_TORCH}", [*pip, _TORCH])
    except SetupError:
        say(f"{_TORCH} is not to be had for this machine; taking the newest that is")
    run_step(
        f"Installing Embedline with its extras {_EXTRAS}",
        [*pip, "--upgrade-strategy", "only-if-needed", "--editable", f"{settings.root}[{_EXTRAS}]"],
    )
    stamp.write_text(fingerprint)


def compile_sources(settings: Settings) -> None:
    """Compile the package's sources, as pip does for an installed package; what is up to date is skipped.

    The server's OS user may write nothing here: without this each of its sessions compiles them anew, for 0.1 s.
    """
    command = [str(settings.python), "-m", "compileall", "-q", str(settings.source)]
    if subprocess.run(command, check=False).returncode != 0:
        say("The sources cannot be compiled ahead; sessions of the server begin more slowly")


def _create(settings: Settings, version: str) -> None:
    interpreter = Path(f"/usr/bin/python{version}")
    if not interpreter.exists():
        raise SetupError(
            f"PL/Python is linked with Python {version}, but {interpreter} is missing\n"
            f"Run: apt-get install python{version}"
        )
    if settings.python.exists() and (settings.venv / "lib" / f"python{version}").is_dir():
        return
    if settings.venv.exists():
        shutil.rmtree(settings.venv)
    run_step(f"Creating .venv with Python {version}", [str(interpreter), "-m", "venv", str(settings.venv)])


def _fingerprint(settings: Settings, version: str) -> str:
    digest = hashlib.sha256((settings.root / "pyproject.toml").read_bytes())
    digest.update(f"\0{version}\0{settings.root}\0{_TORCH}\0{_EXTRAS}".encode())
    return digest.hexdigest() + "\n"
