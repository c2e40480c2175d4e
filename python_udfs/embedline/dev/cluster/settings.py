"""Find the paths of the local installation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from embedline.dev.cluster.console import SetupError

DEFAULT_PORT = 54329


@dataclass(frozen=True)
class Settings:
    """The checkout and the paths that the set-up fills."""

    root: Path
    data_dir: Path
    port: int

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def models(self) -> Path:
        return self.root / ".models"

    @property
    def source(self) -> Path:
        return self.root / "python_udfs"

    @property
    def site_packages(self) -> Path:
        """Return the venv's site-packages.

        The server reads them, so the interpreter's version is the venv's own, not ours.
        """
        found = sorted(self.venv.glob("lib/python3.*/site-packages"))
        if not found:
            raise SetupError(f"there is no virtual environment in {self.venv}\nRun: make setup")
        return found[-1]

    @property
    def server_python_path(self) -> str:
        """Return PYTHONPATH of the server.

        It reads no .pth file of an editable install, so the checkout is named, too.
        """
        return f"{self.site_packages}{os.pathsep}{self.source}"


def load_settings() -> Settings:
    """Read EMBEDLINE_PGDATA and EMBEDLINE_PORT."""
    root = Path(__file__).resolve().parents[4]
    if not (root / "pyproject.toml").is_file():
        raise SetupError(
            f"{root} is no checkout of Embedline; the local cluster is set up from a clone, not from a wheel"
        )
    if os.pathsep in str(root):
        raise SetupError(
            f"{root}: the server's PYTHONPATH cannot hold a path with {os.pathsep!r} in it\nMove the checkout."
        )
    data_dir = Path(os.environ.get("EMBEDLINE_PGDATA") or root / ".postgres").absolute()
    text = os.environ.get("EMBEDLINE_PORT") or str(DEFAULT_PORT)
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise SetupError(
            f"EMBEDLINE_PORT={text} is not a port number\nUse a number from 1024 to 65535, for example {DEFAULT_PORT}."
        )
    return Settings(root=root, data_dir=data_dir, port=int(text))
