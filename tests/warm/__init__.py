"""Sessions of a test run that begin with their imports made and the models' tokenizers read.

A new session spends 0.15 s of CPU on importing the package, 0.15 s on a tokenizer of 3.5 MB, and 0.45 s on the client of a remote
provider. A library of 40 lines, built for the run, does this in the postmaster; each session is forked from it.
Servers that tests start for themselves, and every server outside the tests, import as always.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from embedline.dev.cluster import headers
from embedline.dev.cluster.settings import load_settings

_SOURCE = Path(__file__).with_name("warm.c")
_ROOT = Path(__file__).resolve().parents[2]
_BUILD = _ROOT / ".build"
_FUNCTIONS = _ROOT / "sql" / "functions"
_IMPORT = re.compile(r"^ +from (embedline[\w.]*) import (\w+)$", re.MULTILINE)
# What the package imports where it needs it.
_LATER = (
    "embedline.embedders.local",
    "embedline.providers.openai_compatible",
    "ftfy",
    "numpy",
    "openai",
    "semantic_text_splitter",
    "tokenizers",
)

# The tokenizers of the template's models, in the form in which the database has them: 0.1 s of CPU for each session. The
# pattern that create_pipeline reads expressions with: 0.03 s.
_TOKENIZERS = """
from embedline.chunking.measure import measure_of
from embedline.core import expression
from embedline.documents.readability import readability
expression._tokens()
for path in {paths}:
    read = tokenizers.Tokenizer.from_file(path)
    read.no_truncation()
    read.no_padding()
    measure_of(read.to_str())
    readability(read.to_str(), 0.5)
"""


def library(major: int) -> Path | None:
    """Return the library for a server of this release, built if need be.

    None if this machine cannot build it.
    """
    folder = headers.server_headers(load_settings(), major)
    # From Python 3.12 on, an interpreter that runs takes no more built-in modules, and PL/Python adds its own.
    if folder is None or sys.version_info >= (3, 12):
        return None
    built = _BUILD / f"warm-{major}-{hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not built.exists():
        _BUILD.mkdir(exist_ok=True)
        building = built.with_suffix(f".{os.getpid()}")
        command = ["gcc", "-shared", "-fPIC", "-O1", f"-I{folder}", str(_SOURCE), "-o", str(building)]
        if shutil.which("gcc") is None or subprocess.run(command, check=False, capture_output=True).returncode != 0:
            return None
        building.chmod(0o755)
        building.rename(built)
    return built


def script() -> str:
    """Return the statements that import what SQL functions import, and read tokenizers."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(_FUNCTIONS.glob("*.sql"))]
    names = sorted({f"{package}.{module}" for text in texts for package, module in _IMPORT.findall(text)})
    imports = "".join(f"import {name}\n" for name in (*names, *_LATER))
    # PL/Python adds its module later than the interpreter makes this list. A collection in a session would copy the pages of
    # all that was imported.
    paths = [str(_ROOT / ".models" / model / "tokenizer.json") for model in ("static-256", "minilm")]
    made = imports + _TOKENIZERS.format(paths=paths)
    return f"{made}import gc, sys\nsys.builtin_module_names += ('plpy',)\ngc.collect()\ngc.freeze()\n"
