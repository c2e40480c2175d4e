"""The set-up behind the Makefile: what it installs, what it refuses before, and what it mends in a moved checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedline.dev.cluster import headers, system, virtualenv
from embedline.dev.cluster import server_user as server_user_module
from embedline.dev.cluster.console import SetupError
from embedline.dev.cluster.server_user import check_place
from embedline.dev.cluster.settings import Settings


def checkout(root: Path) -> Settings:
    """A checkout with a virtual environment, a script and an editable install as pip makes them."""
    root.mkdir(parents=True)
    settings = Settings(root=root, data_dir=root / ".postgres", port=54329)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(settings.venv)], check=True)
    add_script(settings)
    (settings.site_packages / "_embedline.pth").write_text(f"{root}/python_udfs\n")
    described = settings.site_packages / "embedline-0.1.0.dist-info"
    described.mkdir()
    (described / "direct_url.json").write_text(f'{{"dir_info": {{"editable": true}}, "url": "{root.as_uri()}"}}')
    package = root / "python_udfs"
    package.mkdir()
    (package / "where_i_am.py").write_text("print(__file__)\n")
    return settings


def add_script(settings: Settings) -> None:
    script = settings.venv / "bin" / "where"
    script.write_text(f"#!{settings.python}\nimport where_i_am  # {settings.root}-2 is another checkout\n")
    script.chmod(0o755)


def run_script(settings: Settings) -> str:
    done = subprocess.run(
        [settings.venv / "bin" / "where"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("command", [["mv"], ["cp", "-a"]])
def test_a_moved_or_copied_environment_is_mended(command: list[str], tmp_path: Path) -> None:
    # With a name that begins as the old one's does, and one that a URL writes in another way.
    old = checkout(tmp_path / "embedline")
    assert run_script(old) == f"{old.root}/python_udfs/where_i_am.py"
    new = Settings(root=tmp_path / "embedline-ä" / "clone", data_dir=old.data_dir, port=old.port)
    new.root.parent.mkdir()
    subprocess.run([*command, old.root, new.root], check=True)
    virtualenv._mend_moved(new)
    assert run_script(new) == f"{new.root}/python_udfs/where_i_am.py"
    script = (new.venv / "bin" / "where").read_text()
    assert script.startswith(f"#!{new.python}\n")
    assert f"{old.root}-2 is another" in script
    assert new.root.as_uri() in (new.site_packages / "embedline-0.1.0.dist-info" / "direct_url.json").read_text()
    activated = subprocess.run(
        ["bash", "-c", f'. "{new.venv}/bin/activate" && echo "$VIRTUAL_ENV"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert activated.stdout.strip() == str(new.venv)
    before = {path: path.stat().st_mtime_ns for path in new.venv.rglob("*") if path.is_file()}
    virtualenv._mend_moved(new)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "mended once"
    if command != ["mv"]:
        assert run_script(old) == f"{old.root}/python_udfs/where_i_am.py"


@pytest.mark.parametrize("name", ["with a space", "long-" * 30])
def test_an_environment_whose_new_path_no_script_can_name_is_made_again(name: str, tmp_path: Path) -> None:
    old = checkout(tmp_path / "embedline")
    new = Settings(root=tmp_path / name, data_dir=old.data_dir, port=old.port)
    old.root.rename(new.root)
    virtualenv._mend_moved(new)
    assert not new.venv.exists()


def test_an_environment_that_stays_is_left_alone(tmp_path: Path) -> None:
    settings = checkout(tmp_path / "embedline")
    virtualenv._mend_moved(settings)
    assert run_script(settings)
    virtualenv._mend_moved(Settings(root=tmp_path / "none", data_dir=tmp_path, port=54329))


def test_no_compiler_is_installed_where_pgvector_is_a_package() -> None:
    packages = system.required_packages(17)
    assert not [name for name in packages if "dev" in name or name == "build-essential"]
    assert "postgresql-plpython3-17" in packages


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's server runs as another user")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are closed to the server's."""
    with tempfile.TemporaryDirectory(prefix="embedline-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@as_root
@pytest.mark.parametrize("server_user", ["postgres", "embedline-not-installed-yet"])
def test_a_checkout_that_the_server_cannot_read_is_refused_first(
    server_user: str, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_user_module, "_SERVER_USER", server_user)
    home = open_folder / "home"
    source = home / "embedline" / "python_udfs"
    source.mkdir(parents=True)
    (source / "module.py").write_text("")
    root, data_dir = source.parent, source.parent / ".postgres"
    check_place(root, source, data_dir)

    home.chmod(0o700)
    with pytest.raises(SetupError, match=f'(?s)"{server_user}".*{home} is closed to it.*chmod o\\+rX {home}'):
        check_place(root, source, data_dir)
    home.chmod(0o755)
    (source / "module.py").chmod(0o600)
    with pytest.raises(SetupError, match=r"module\.py is closed to it"):
        check_place(root, source, data_dir)
    (source / "module.py").chmod(0o644)
    closed = open_folder / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(SetupError, match=f"{closed} is closed to it"):
        check_place(root, source, closed / "deep" / "data")


@as_root
def test_a_closed_home_is_told_before_anything_is_installed(tmp_path: Path) -> None:
    """The step of `make up`, in a copy of the checkout that the server cannot reach."""
    root = tmp_path / "embedline"
    root.mkdir()
    for name in ("pyproject.toml", "python_udfs"):
        subprocess.run(["cp", "-a", Path(system.__file__).resolve().parents[4] / name, root / name], check=True)
    tmp_path.chmod(0o700)
    done = subprocess.run(
        ["/usr/bin/python3", "-m", "embedline.dev.cluster.bootstrap", "up"],
        cwd=root, env={"PATH": os.environ["PATH"], "PYTHONPATH": "python_udfs"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "is closed to it" in done.stderr
    assert "»" not in done.stderr, "nothing was begun"
    assert not (root / ".venv").exists()


def test_headers_are_those_installed_or_those_unpacked(tmp_path: Path) -> None:
    settings = Settings(root=tmp_path, data_dir=tmp_path / ".postgres", port=54329)
    major = system.choose_major(settings.data_dir)
    installed = system.pg_config(major, "includedir-server")
    expected = installed if (installed / "postgres.h").exists() else None
    assert headers.server_headers(settings, major) == expected
    unpacked = tmp_path / ".cache" / f"headers-{major}" / installed.relative_to("/")
    unpacked.mkdir(parents=True)
    (unpacked / "postgres.h").touch()
    assert headers.server_headers(settings, major) == (expected or unpacked)


def test_tests_keep_their_bytecode_whatever_the_environment_says() -> None:
    command = ["make", "--silent", "--eval", "_shown: ; @echo [$${PYTHONDONTWRITEBYTECODE-}]", "_shown"]
    root = Path(system.__file__).resolve().parents[4]
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    assert (
        subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout == "[]\n"
    )
