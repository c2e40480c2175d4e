"""An application of somebody else, with tables and an Alembic history of its own; env.py is as `alembic init` makes it."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

from programs import Process

_MODELS = '''"""The application's tables."""

import sqlalchemy as sa

metadata = sa.MetaData()
article = sa.Table(
    "article", metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("title", sa.Text),
    sa.Column("body", sa.Text),
    sa.Column("live", sa.Boolean, nullable=False, server_default=sa.true()),
)
'''

PIPELINE = """
[pipelines.article]
source = "public.article"
content = "title || ': ' || body"
model = "static-256"
"""


class Application:
    """A folder with an Alembic environment, driven by the real command line."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.folder = folder
        self.dsn = dsn
        self.alembic("init", "migrations")
        self._replace("alembic.ini", "driver://user:pass@localhost/dbname", self._url)
        (folder / "models.py").write_text(_MODELS, encoding="utf-8")
        self._replace(
            "migrations/env.py", "target_metadata = None", "import models\n\ntarget_metadata = models.metadata"
        )
        self._replace(
            "migrations/env.py", "target_metadata=target_metadata\n", "target_metadata=target_metadata, include_schemas=True\n"
        )  # fmt: skip

    @property
    def _url(self) -> str:
        return self.dsn.replace("%", "%%").replace("://", "+psycopg://")

    def copy(self, folder: Path, dsn: str) -> Application:
        """Copy the application into another folder, for a clone of its database."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        other = copy.copy(self)
        other.folder, other.dsn = folder, dsn
        other._replace("alembic.ini", self._url, other._url)
        return other

    def _replace(self, name: str, old: str, new: str) -> None:
        path = self.folder / name
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{name} has no {old!r}"
        path.write_text(text.replace(old, new), encoding="utf-8")
        # Python takes compiled code for current by whole seconds and size; both may be the same here.
        later = path.stat().st_mtime + 2
        os.utime(path, (later, later))

    def act_as(self, role: str) -> None:
        """Have Alembic connect as before and then act as another role."""
        self._replace("alembic.ini", self._url, f"{self._url}?options=-crole%%3D{role}")

    def declare(self, text: str = PIPELINE) -> None:
        """Write embedline.toml beside alembic.ini."""
        (self.folder / "embedline.toml").write_text(text, encoding="utf-8")

    def start(self, program: str, *arguments: str) -> Process:
        """Start a program of this virtual environment in the application's folder."""
        environment = {name: value for name, value in os.environ.items() if name != "EMBEDLINE_DSN"}
        return Process(program, arguments, cwd=self.folder, env=environment)

    def run(self, program: str, *arguments: str, fails: bool = False) -> str:
        """Run a program; return its output, or in one line what it said of its failure, which must be no traceback."""
        process = self.start(program, *arguments)
        output, messages = process.communicate(timeout=120)
        assert (process.returncode != 0) == fails, f"{program} {' '.join(arguments)}: {messages}{output}"
        assert not fails or "Traceback" not in messages, messages
        return " ".join((messages + output).split()) if fails else output

    def alembic(self, *arguments: str, fails: bool = False) -> str:
        """Run alembic."""
        return self.run("alembic", *arguments, fails=fails)

    def autogenerate(self, message: str) -> list[str]:
        """Run `alembic revision --autogenerate`; return the texts of the files that it wrote, in the chain's order."""
        before = set(self.revisions())
        self.alembic("revision", "--autogenerate", "-m", message)
        return [path.read_text(encoding="utf-8") for path in self.revisions() if path not in before]

    def revisions(self) -> list[Path]:
        """Return the revision files from the first to the head."""
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(self.folder / "migrations"))
        scripts = reversed(list(ScriptDirectory.from_config(config).walk_revisions()))
        return [Path(script.path) for script in scripts]

    def rewrite(self, revision: Path, old: str, new: str) -> None:
        """Edit a revision file by hand."""
        self._replace(str(revision.relative_to(self.folder)), old, new)
