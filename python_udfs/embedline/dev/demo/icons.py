"""Read the icons of Debian's adwaita-icon-theme: PNG files with speaking names."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path("/usr/share/icons/Adwaita")
# From the finest; not every icon has each.
_SIZES = ("256x256", "96x96", "64x64", "48x48", "32x32")


def read_icons() -> dict[str, bytes]:
    """Return the file of each coloured icon by its name in words.

    Raises FileNotFoundError if the package is not installed.
    """
    found: dict[str, bytes] = {}
    for size in _SIZES:
        for path in sorted((_FOLDER / size).rglob("*.png")):
            name = path.stem.replace("-", " ")
            # Symbolic ones are masks that a desktop colours: black alone.
            if "symbolic" not in name:
                found.setdefault(name, path.read_bytes())
    if not found:
        raise FileNotFoundError(f"{_FOLDER} has no icons; apt-get install adwaita-icon-theme")
    return found
