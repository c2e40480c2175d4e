"""PgBouncer in transaction mode in front of a database, in a process and with a configuration of its own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg import conninfo

from embedline.dev.cluster import monitors
from embedline.dev.cluster.server_user import as_server_user, server_user
from embedline.dev.cluster.settings import load_settings
from support import free_port, wait_until


def _program() -> tuple[str, dict[str, str]]:
    """Return the path of PgBouncer, and the environment in which it finds its libraries."""
    settings = load_settings()
    path = monitors.program(settings, "pgbouncer")
    assert path.exists(), f"{path} is missing: run make _test-setup"
    return str(path), {**os.environ, "LD_LIBRARY_PATH": monitors.library_path(settings)}


def version() -> tuple[int, ...]:
    """Return the version of PgBouncer, for example (1, 18)."""
    path, environment = _program()
    told = subprocess.run([path, "--version"], env=environment, capture_output=True, text=True, check=True).stdout
    found = re.search(r"PgBouncer (\d+)\.(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2])


@contextlib.contextmanager
def pooled(database_dsn: str, **options: str) -> Iterator[str]:
    """Run PgBouncer for as long as the block lasts; yield the URI of the database through it."""
    path, environment = _program()
    parts, port = conninfo.conninfo_to_dict(database_dsn), free_port()
    folder = Path(tempfile.mkdtemp(prefix="embedline-pool-"))
    (folder / "users").write_text(f'"{parts["user"]}" "{parts["password"]}"\n')
    given = {"default_pool_size": "3", "server_tls_sslmode": "disable", **options}
    (folder / "ini").write_text(
        f"[databases]\n{parts['dbname']} = host={parts['host']} port={parts['port']}\n[pgbouncer]\npool_mode = transaction\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = plain\nauth_file = {folder}/users\n"
        + "".join(f"{name} = {value}\n" for name, value in given.items())
    )
    if os.geteuid() == 0:
        user = server_user()
        for owned in (folder, *folder.iterdir()):
            os.chown(owned, user.pw_uid, user.pw_gid)
    process = subprocess.Popen(
        as_server_user([path, "-q", str(folder / "ini")]), env=environment, stderr=subprocess.DEVNULL
    )
    dsn = f"postgresql://{parts['user']}:{parts['password']}@127.0.0.1:{port}/{parts['dbname']}"

    def answers() -> bool:
        try:
            psycopg.connect(dsn).close()
        except psycopg.OperationalError:
            return False
        return True

    try:
        wait_until(answers, 20, "PgBouncer answers")
        yield dsn
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)
