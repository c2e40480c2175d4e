"""Start the model host.

Usage: `python -m embedline.model_host --socket PATH --config-json JSON --owner-pid N ...`. It detaches from the backend
first (fork, new session, fresh signals), then sets its limits, and only then imports the heavy modules.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
from typing import NoReturn

from embedline.model_host.host_settings import HostSettings
from embedline.model_host.memory import limit_data

# Makes the kernel's out-of-memory killer prefer the host, because the host is cheap to start again and PostgreSQL is
# not.
OOM_SCORE_ADJUSTMENT = 900


def _detach() -> None:
    """Become a daemon.

    The backend that started this process must not be its parent, or a zombie would stay with the backend.
    """
    if os.fork() > 0:
        os._exit(0)
    # The launcher asked for a new session. This process is not its leader, so it can never get a controlling terminal.
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        # Signals 32 and 33 belong to the C library and cannot be set.
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    # The inherited mask of the backend's I/O thread blocks everything.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.umask(0o077)
    os.chdir("/")


def _limit(settings: HostSettings) -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as adjustment:
        adjustment.write(str(OOM_SCORE_ADJUSTMENT))
    if not settings.may_use_accelerator:
        limit_data(settings.memory_limit_mb)
    # A core dump would hold the users' texts.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="python -m embedline.model_host")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--owner-pid", type=int, required=True)
    parser.add_argument("--owner-start", type=int, required=True)
    arguments = parser.parse_args()
    _detach()
    settings = HostSettings(**json.loads(arguments.config_json))
    _limit(settings)

    from embedline.model_host.place import Owner
    from embedline.model_host.server import serve

    serve(arguments.socket, settings, Owner(arguments.owner_pid, arguments.owner_start))


if __name__ == "__main__":
    main()
