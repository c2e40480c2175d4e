"""Django's own runner over a project with a pipeline, on a database that it makes and migrates itself."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

from pytest_postgresql.executors import NoopExecutor

_PROJECT = Path(__file__).parent / "django_project"


def test_a_project_s_tests_pass_in_django_s_runner(server_dsn: str, template_server: NoopExecutor) -> None:
    database = f"embedline_test_django_{secrets.token_hex(4)}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "django", "test", "--noinput"],
        cwd=_PROJECT,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "settings",
            "EMBEDLINE_DSN": server_dsn,
            "NOTES_DATABASE": database,
            "NOTES_TEMPLATE": template_server.template_dbname,
            "PYTHONPATH": str(_PROJECT),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    ran = re.search(r"^Ran (\d+) tests", done.stderr, re.MULTILINE)
    assert ran is not None
    assert int(ran.group(1)) == 10
    assert "OK" in done.stderr
