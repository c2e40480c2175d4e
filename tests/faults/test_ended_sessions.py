"""A session that ends while its provider's thread works ends alone: no crash, and no restart of all sessions."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from certificates import Authority, make_authority
from conftest import Connect
from support import scalar, wait_until

# The file is read again for each client. With so many certificates that takes a second, in which the session ends.
_CERTIFICATES = 3_000


@pytest.fixture(scope="module")
def authority() -> Iterator[Authority]:
    with tempfile.TemporaryDirectory(prefix="embedline-") as folder:
        made = make_authority(Path(folder))
        many = Path(folder) / "many.pem"
        many.write_text(made.certificate.read_text() * _CERTIFICATES)
        many.chmod(0o644)
        yield made


def _has_open(pid: int, name: str) -> bool:
    with contextlib.suppress(OSError):
        return any(os.readlink(file).endswith(name) for file in Path(f"/proc/{pid}/fd").iterdir())
    return False


def test_a_session_that_is_terminated_while_certificates_are_read_does_not_crash(
    database: psycopg.Connection, connect: Connect, authority: Authority
) -> None:
    # Its options are checked, then its thread reads the authorities; nothing listens at the address.
    options = json.dumps({"ca_file": str(authority.folder / "many.pem")})
    for _ in range(4):
        session = connect()
        thread, ended = _create_model(session, options)
        pid = session.info.backend_pid
        wait_until(lambda pid=pid: _has_open(pid, "many.pem"), 30, "the authorities are read")
        database.execute("SELECT pg_terminate_backend(%s)", (pid,))
        thread.join(20)
        assert isinstance(ended[0], psycopg.errors.AdminShutdown), ended
        wait_until(
            lambda pid=pid: scalar(database, "SELECT count(*) FROM pg_stat_activity WHERE pid = %s", (pid,)) == 0,
            20,
            "the session is gone",
        )
        # Had one crashed, the server would have ended this session, too.
        assert scalar(database, "SELECT 1") == 1


def _create_model(session: psycopg.Connection, options: str) -> tuple[threading.Thread, list[psycopg.Error]]:
    """Start to create a model in another thread; return it, and the list that the error comes into."""
    ended: list[psycopg.Error] = []
    call = (
        "SELECT embedline.create_model('m', 'openai', 'm', base_url => 'https://127.0.0.1:9/v1', options => %s::jsonb)"
    )

    def run() -> None:
        try:
            session.execute(call, (options,))
        except psycopg.Error as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended
