"""Fill the virtual environment in layers, each only if a step needs it.

The layers are the demo's packages, the developers' tools, and torch. It uses the very Python that the server's
PL/Python links, so that the server can use it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

from embedline.dev.cluster import system
from embedline.dev.cluster.console import SetupError, capture, run_step, say
from embedline.dev.cluster.settings import Settings

# The tested version first. A plain `torch` can pull gigabytes of CUDA libraries, so the plan is read before it is
# followed.
_TORCH = ("torch==2.13.0", "torch>=2.6")
_CUDA_PACKAGE = re.compile(r"nvidia-|cuda-|triton")
_TORCH_EXTRA, _TOOLS_EXTRA, _DEMO_EXTRA, _DOCS_EXTRA = "train", "dev", "demo", "docs"
# Longest interpreter line that the kernel reads (BINPRM_BUF_SIZE); pip writes another form for longer paths.
_SHEBANG_BYTES = 127


def linked_python(major: int) -> str:
    """Return the Python version that the server's PL/Python is linked with.

    For example "3.11".
    """
    library = system.pg_config(major, "pkglibdir") / "plpython3.so"
    match = re.search(r"libpython(3\.\d+)", capture(["ldd", str(library)]))
    if match is None:
        raise SetupError(f"{library} is linked with no libpython; Embedline needs PL/Python 3")
    return match.group(1)


def ensure_virtualenv(settings: Settings, major: int) -> None:
    """Create the environment and install the package with its demo's needs."""
    version = linked_python(major)
    _mend_moved(settings)
    _create(settings, version)
    _ensure_layer(settings, _DEMO_EXTRA, f"The virtual environment is up to date (Python {version})")


def ensure_tools(settings: Settings) -> None:
    """Install the needs of tests and linters."""
    _ensure_layer(settings, _TOOLS_EXTRA, "The developers' tools are up to date")


def ensure_site_builder(settings: Settings) -> None:
    """Install what builds the site of docs/."""
    _ensure_layer(settings, _DOCS_EXTRA, "The builder of the documentation is up to date")


def ensure_torch(settings: Settings, wish: str) -> None:
    """Install torch, sentence-transformers, and what trains with them.

    `wish` is "1" for always, "0" for never, and "" for a build without CUDA if one is offered.
    """
    if wish not in ("", "0", "1"):
        raise SetupError(f"TORCH={wish} is no choice\nUse TORCH=1 to install torch, TORCH=0 to leave it out.")
    if wish == "0" or _is_installed(settings, _TORCH_EXTRA):
        return
    refused = settings.venv / "embedline-no-torch.stamp"
    if not wish and refused.is_file() and refused.read_text() == _fingerprint(settings):
        _say_without_torch()
        return
    requirement = next((name for name in _TORCH if _is_without_cuda(settings, name)), None)
    if requirement is None and not wish:
        refused.write_text(_fingerprint(settings))
        _say_without_torch()
        return
    run_step(f"Installing {requirement or _TORCH[-1]}", [*_pip(settings), requirement or _TORCH[-1]])
    _ensure_layer(settings, _TORCH_EXTRA, "")


def compile_sources(settings: Settings) -> None:
    """Compile the package's sources, as pip does for an installed package.

    Up-to-date ones are skipped. The server's OS user may write nothing here, so without this each of its sessions
    compiles them again, for 0.1 s.
    """
    command = [str(settings.python), "-m", "compileall", "-q", str(settings.source)]
    if subprocess.run(command, check=False).returncode != 0:
        say("The sources cannot be compiled ahead; sessions of the server begin more slowly")


def _say_without_torch() -> None:
    say(
        "No build of torch without CUDA is offered here: tests that need torch are skipped (make test TORCH=1 installs it)"
    )


def _is_without_cuda(settings: Settings, requirement: str) -> bool:
    """Return True if pip would install torch without CUDA's libraries.

    Nothing is installed.
    """
    say(f"Asking pip what {requirement} would install")
    plan = [*_pip(settings), "--quiet", "--dry-run", "--report", "-", requirement]
    done = subprocess.run(plan, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        return False
    names = [str(item["metadata"]["name"]).lower() for item in json.loads(done.stdout)["install"]]
    return not any(_CUDA_PACKAGE.match(name) for name in names)


def _pip(settings: Settings) -> list[str]:
    return [str(settings.python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]


def _ensure_layer(settings: Settings, extra: str, present: str) -> None:
    """Install the package with an extra, unless that was done for this pyproject.toml."""
    if _is_installed(settings, extra):
        say(present)
        return
    run_step(
        f"Installing Embedline with its extra {extra}",
        [*_pip(settings), "--upgrade-strategy", "only-if-needed", "--editable", f"{settings.root}[{extra}]"],
    )
    _stamp(settings, extra).write_text(_fingerprint(settings))


def _stamp(settings: Settings, extra: str) -> Path:
    return settings.venv / f"embedline-{extra}.stamp"


def _is_installed(settings: Settings, extra: str) -> bool:
    stamp = _stamp(settings, extra)
    return stamp.is_file() and stamp.read_text() == _fingerprint(settings)


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


def _mend_moved(settings: Settings) -> None:
    """Put this checkout's path into an environment that was moved or copied here.

    Its scripts name the other path.
    """
    old = _recorded_path(settings.venv / "pyvenv.cfg")
    if old is None or old == settings.venv:
        return
    say(f"The checkout was moved or copied from {old.parent}: mending .venv")
    shebang = f"#!{settings.python}"
    if " " in shebang or len(os.fsencode(shebang)) > _SHEBANG_BYTES:
        # Its scripts need another form, which pip writes.
        shutil.rmtree(settings.venv)
        return
    site_packages = settings.site_packages
    linked = [*site_packages.glob("*.pth"), *site_packages.glob("embedline-*.dist-info/direct_url.json")]
    # The configuration comes last, because it marks the work as done.
    for path in [*sorted((settings.venv / "bin").iterdir()), *linked, settings.venv / "pyvenv.cfg"]:
        if path.is_file() and not path.is_symlink():
            _replace_path(path, old.parent, settings.root)


def _recorded_path(configuration: Path) -> Path | None:
    """Return the path where an environment was made, None if there is none."""
    try:
        match = re.search(r"^command = .* -m venv (?:--\S+ )*(.+)$", configuration.read_text(), re.MULTILINE)
    except FileNotFoundError:
        return None
    return Path(match.group(1)) if match else None


def _replace_path(path: Path, old: Path, new: Path) -> None:
    content = path.read_bytes()
    if b"\0" in content:  # a program
        return
    # pip records some paths as URLs.
    before, after = (quote(str(old)), quote(str(new))) if path.suffix == ".json" else (str(old), str(new))
    # Only whole paths: /srv/embedline is no part of /srv/embedline-2.
    pattern = re.compile(re.escape(os.fsencode(before)) + rb"(?![\w.-])")
    changed = pattern.sub(lambda _: os.fsencode(after), content)
    if changed != content:
        path.write_bytes(changed)


def _fingerprint(settings: Settings) -> str:
    digest = hashlib.sha256((settings.root / "pyproject.toml").read_bytes())
    return digest.hexdigest() + "\n"
