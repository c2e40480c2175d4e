"""Count the statements that run in this process, and in the processes and servers that it starts.

`make coverage` puts this folder on PYTHONPATH, and so do the tests for their servers: see throwaway.server_python_path.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from pathlib import Path

import coverage

_FOLDER = Path(__file__).resolve().parent

# Here, since the model host inherits nothing of the kind from its backend.
os.environ["EMBEDLINE_COVERAGE_DATA"] = str(_FOLDER.parents[1] / ".build" / "coverage" / "data")
os.environ["COVERAGE_PROCESS_START"] = str(_FOLDER / "coverage.ini")
coverage.process_startup()
if Path("/proc/self/exe").resolve().name == "postgres":
    # A backend ends with exit() and never takes its interpreter apart: Python's own atexit is not run there.

    @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)
    def _save(_status: int, _argument: object) -> None:
        atexit._run_exitfuncs()

    sys.embedline_save = _save  # type: ignore[attr-defined]  # what C calls has to live as long as the process
    ctypes.CDLL(None).on_exit(_save, None)
