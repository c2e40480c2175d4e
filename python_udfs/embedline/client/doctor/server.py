"""Query the server, the database, and the Python inside it, for the checks."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, LiteralString

from embedline.client.connection import Connection

# Packages that the server's Python imports sooner or later.
_REQUIRED_MODULES = "import embedline, ftfy, markdown_it, numpy, semantic_text_splitter, tokenizers"
# In the order of their urgency.
Verdict = Literal["error", "warning", "note", "ok"]


@dataclass(frozen=True)
class Finding:
    """The finding of one check: a line of `embedline doctor`, with advice."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Server:
    """The examined database."""

    connection: Connection

    def scalar(self, query: LiteralString, *parameters: object) -> Any:
        """Return the first column of the first row, or None."""
        row = self.connection.execute(query, parameters or None).fetchone()
        return None if row is None else row[0]

    @functools.cached_property
    def major(self) -> int:
        return self.connection.info.server_version // 10000

    @functools.cached_property
    def is_superuser(self) -> bool:
        return bool(self.scalar("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"))

    @functools.cached_property
    def database(self) -> str:
        return str(self.scalar("SELECT current_database()"))

    @functools.cached_property
    def is_installed(self) -> bool:
        return bool(self.scalar("SELECT to_regclass('embedline.setting') IS NOT NULL"))

    def offered(self, extension: str) -> str | None:
        """Return the version of an extension that the server could install, or None."""
        found = self.scalar("SELECT default_version FROM pg_available_extensions WHERE name = %s", extension)
        return None if found is None else str(found)

    def installed(self, extension: str) -> str | None:
        """Return the version of an extension in this database, or None."""
        found = self.scalar("SELECT extversion FROM pg_extension WHERE extname = %s", extension)
        return None if found is None else str(found)

    @functools.cached_property
    def inside(self) -> dict[str, Any]:
        """Return the facts that the server's Python knows of itself.

        The package and /dev/shm are among them. They are empty if we may not ask it. Before `embedline upgrade`
        plpython3u is not there, so it is created for this query, and rolled back.
        """
        if not self.is_superuser or self.offered("plpython3u") is None:
            return {}
        with self.connection.transaction(force_rollback=True):
            self.connection.execute("SET LOCAL client_min_messages = warning")
            self.connection.execute("CREATE EXTENSION IF NOT EXISTS plpython3u")
            self.connection.execute(_PROBE.encode())
            found: dict[str, Any] = json.loads(str(self.scalar("SELECT current_setting('embedline.probe')")))
        return found


_PROBE = f"""
DO LANGUAGE plpython3u $python$
import json, os, sys
found = {{'python': sys.version.split()[0], 'prefix': sys.prefix, 'path': [folder for folder in sys.path if folder]}}
try:
    {_REQUIRED_MODULES}
    found['version'], found['folder'] = embedline.__version__, os.path.dirname(embedline.__file__)
except ImportError as error:
    found['missing'] = str(error)
try:
    disk = os.statvfs('/dev/shm')
    found['shared_memory'] = disk.f_frsize * disk.f_bavail
except OSError:
    pass
plpy.execute(plpy.prepare("SELECT set_config('embedline.probe', $1, true)", ['text']), [json.dumps(found)])
$python$
"""
Check = Callable[[Server], Iterable[Finding]]
