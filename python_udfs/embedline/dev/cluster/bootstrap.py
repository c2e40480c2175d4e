"""Run the steps behind the Makefile.

Usage: `PYTHONPATH=python_udfs /usr/bin/python3 -m embedline.dev.cluster.bootstrap STEP`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedline.dev.cluster import headers, monitors, pgvector, system, virtualenv
from embedline.dev.cluster.console import SetupError, run_step, say
from embedline.dev.cluster.server import DATABASE, SUPERUSER, Cluster
from embedline.dev.cluster.server_user import check_place, check_reachable
from embedline.dev.cluster.settings import Settings, load_settings

_CACHES = (".mypy_cache", ".pytest_cache", ".ruff_cache", ".import_linter_cache", ".hypothesis", ".build", ".cache")


def local_cluster(settings: Settings | None = None) -> Cluster:
    """Return the checkout's own cluster; nothing is started."""
    settings = settings or load_settings()
    return Cluster(
        data_dir=settings.data_dir,
        port=settings.port,
        bin_dir=system.bin_dir(system.choose_major(settings.data_dir)),
        python_path=settings.server_python_path,
    )


def setup(settings: Settings) -> None:
    """Install everything that the cluster needs; skip installed parts."""
    # First of all, because a checkout that the server cannot read needs none of the rest.
    check_place(settings.root, settings.source, settings.data_dir)
    major = system.choose_major(settings.data_dir)
    system.ensure_packages(major)
    pgvector.ensure_pgvector(major)
    virtualenv.ensure_virtualenv(settings, major)
    virtualenv.compile_sources(settings)
    _ensure_models(settings)


def lint_setup(settings: Settings) -> None:
    """Install the linters' needs.

    The system packages name the Python, the virtual environment holds the tools.
    """
    major = system.choose_major(settings.data_dir)
    system.ensure_packages(major)
    virtualenv.ensure_virtualenv(settings, major)
    virtualenv.ensure_tools(settings)


def docs_setup(settings: Settings) -> None:
    """Install what the site of docs/ is built with."""
    major = system.choose_major(settings.data_dir)
    system.ensure_packages(major)
    virtualenv.ensure_virtualenv(settings, major)
    virtualenv.ensure_site_builder(settings)


def test_setup(settings: Settings) -> None:
    """Install the additional needs of the tests.

    TORCH=1 insists on torch, TORCH=0 leaves it out.
    """
    system.ensure_browser()
    headers.ensure_headers(settings, system.choose_major(settings.data_dir))
    virtualenv.ensure_tools(settings)
    virtualenv.ensure_torch(settings, os.environ.get("TORCH", ""))
    monitors.ensure_monitors(settings)


def train_setup(settings: Settings) -> None:
    """Install what fine-tuning needs, if a build of torch without CUDA is offered.

    TORCH=1 insists on torch.
    """
    virtualenv.ensure_torch(settings, os.environ.get("TORCH", ""))


def images_setup(settings: Settings) -> None:
    """Install the additional needs of the demo of images.

    TORCH=1 insists on torch, TORCH=0 leaves it out: models that were trained before need none.
    """
    system.ensure_pictures()
    virtualenv.ensure_torch(settings, os.environ.get("TORCH", ""))


def up(settings: Settings) -> None:
    """Set up, start the cluster, bring its schema to head, register the local models."""
    setup(settings)
    check_reachable([settings.site_packages, settings.python], "the virtual environment")
    check_reachable([settings.source, settings.models], "the checkout", deep=True)
    cluster = local_cluster(settings)
    if not cluster.initialised:
        say(f"Creating the local cluster in {cluster.data_dir}")
        cluster.init()
    if cluster.running_port() is not None and cluster.is_moved():
        say("The checkout was moved: the local cluster is restarted, its sessions look for the old path")
        # It knows its files by the old path, so its shutdown checkpoint would fail. Recovery at the next start needs
        # none.
        cluster.stop("immediate")
    if cluster.running_port() == cluster.port:
        say(f"The local cluster runs on port {cluster.port}")
    else:
        say(f"Starting the local cluster on port {cluster.port}")
        cluster.start()
    environment = {**os.environ, "EMBEDLINE_DSN": cluster.dsn()}
    alembic = [str(settings.python), "-m", "alembic", "-c", str(settings.root / "alembic.ini"), "upgrade", "head"]
    run_step("Bringing the schema to head (alembic upgrade head)", alembic, env=environment, cwd=settings.root)
    install = [str(settings.python), "-m", "embedline.dev.cluster.install", str(settings.models)]
    run_step("Registering the local models and the scheduled worker", install, env=environment, cwd=settings.root)


def down(settings: Settings) -> None:
    """Stop the cluster; its data stay."""
    cluster = _cluster_without_venv(settings)
    if cluster.postmaster_pid() is None:
        say("The local cluster is not running")
    else:
        say("Stopping the local cluster")
        cluster.stop()


def clean(settings: Settings) -> None:
    """Stop the cluster and remove all files that the set-up put into the checkout.

    System packages stay.
    """
    say(f"Removing the local cluster in {settings.data_dir}, .venv, .models and caches")
    _refuse_foreign_directory(settings.data_dir)
    _cluster_without_venv(settings).remove()
    for path in (settings.venv, settings.models, *(settings.root / name for name in _CACHES)):
        shutil.rmtree(path, ignore_errors=True)
    for top in ("python_udfs", "tests", "alembic"):
        for folder in (settings.root / top).rglob("__pycache__"):
            shutil.rmtree(folder, ignore_errors=True)


def dsn(settings: Settings) -> None:
    """Print the connection URI and nothing else."""
    print(_cluster_without_venv(settings).dsn())


def psql(settings: Settings) -> None:
    """Become psql, connected to the local database.

    The password travels in the environment, not in the arguments.
    """
    cluster = _cluster_without_venv(settings)
    environment = {**os.environ, "PGPASSWORD": cluster.password()}
    arguments = ["psql", "-h", "127.0.0.1", "-p", str(cluster.port), "-U", SUPERUSER, "-d", DATABASE]
    os.execve(cluster.bin_dir / "psql", arguments, environment)  # noqa: S606  no shell wanted


_STEPS = {
    "setup": setup,
    "lint-setup": lint_setup,
    "docs-setup": docs_setup,
    "test-setup": test_setup,
    "train-setup": train_setup,
    "images-setup": images_setup,
    "up": up,
    "down": down,
    "clean": clean,
    "dsn": dsn,
    "psql": psql,
}
_READERS = {"dsn", "psql"}


def _cluster_without_venv(settings: Settings) -> Cluster:
    """Return the cluster for steps that start no server.

    They need no PYTHONPATH for it.
    """
    major = system.choose_major(settings.data_dir) if settings.data_dir.exists() else system.OLDEST_MAJOR
    return Cluster(settings.data_dir, settings.port, system.bin_dir(major), python_path="")


def _refuse_foreign_directory(data_dir: Path) -> None:
    """Refuse to delete a directory that EMBEDLINE_PGDATA names by mistake."""
    if not os.environ.get("EMBEDLINE_PGDATA"):  # .postgres in the checkout is ours, finished or not
        return
    if data_dir.is_dir() and any(data_dir.iterdir()) and not (data_dir / "PG_VERSION").exists():
        raise SetupError(f"{data_dir} is no data directory of PostgreSQL and is left alone\nCheck EMBEDLINE_PGDATA.")
    if (data_dir / "PG_VERSION").exists() and not (data_dir / "embedline.conf").exists():
        raise SetupError(
            f"{data_dir} is a cluster, but none of Embedline's, and is left alone\nCheck EMBEDLINE_PGDATA."
        )


def _ensure_models(settings: Settings) -> None:
    stamp = settings.models / "stamp"
    sources = (
        "dev/cluster/models.py",
        "dev/cluster/audio_tower.py",
        "model_host/bert_graph.py",
        "model_host/prepared.py",
    )
    digest = hashlib.sha256()
    for name in sources:
        digest.update((settings.source / "embedline" / name).read_bytes())
    fingerprint = digest.hexdigest() + "\n"
    made = (
        "static-256/modules.json", "minilm/embedline.json", "all-MiniLM-L6-v2/modules.json", "bge-small/embedline.json",
        "reranker/model.onnx", "speech/towers.json",
    )  # fmt: skip
    if (
        stamp.is_file()
        and stamp.read_text() == fingerprint
        and all((settings.models / name).is_file() for name in made)
    ):
        say("The models are built")
        return
    build = [str(settings.python), "-m", "embedline.dev.cluster.models", str(settings.models)]
    run_step("Building the models from their wheels", build)
    stamp.write_text(fingerprint)


@contextmanager
def _one_at_a_time(settings: Settings) -> Iterator[None]:
    """Make two `make` in one checkout follow each other."""
    descriptor = os.open(settings.root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another make in this checkout")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def main() -> int:
    parser = argparse.ArgumentParser(prog="embedline.dev.cluster.bootstrap", description=__doc__)
    parser.add_argument("step", choices=sorted(_STEPS))
    step = parser.parse_args().step
    os.umask(0o022)  # the server's OS user reads the files made here
    try:
        settings = load_settings()
        if step in _READERS:
            _STEPS[step](settings)
        else:
            with _one_at_a_time(settings):
                _STEPS[step](settings)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        print(
            f"error: {error}\nDid another user run make here before? Run it as that user, or as root.", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
