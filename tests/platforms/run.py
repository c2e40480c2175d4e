"""Try Embedline on other releases of Debian: `make platforms NAME=trixie ARGS='--steps demo,test --users root'`.

Each release is made by debootstrap in a folder that later runs use again. Every step runs in a clean clone of HEAD there, as
root and as a user with sudo. The table goes to docs/platforms.md. This machine's own clusters are left alone, and what is
mounted or started ends with the run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path

from embedline.dev.cluster.console import SetupError, say
from platforms.folder import make_base
from platforms.steps import STEPS, USERS, attempt
from platforms.table import Row, save

# sid is where Debian's newest PostgreSQL is.
PLATFORMS = ("bookworm", "trixie", "sid")


def main() -> int:
    """Run the steps on the platforms; return the number to exit with."""
    options = _options()
    if os.geteuid() != 0:
        raise SetupError("debootstrap and mounts need root\nRun: sudo make platforms")
    os.umask(0o022)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # rooms are closed then, too
    rows: list[Row] = []
    for name in options.platforms:
        base = make_base(options.folder / name / "base", name)
        for user in options.users:
            if options.fresh:
                shutil.rmtree(options.folder / name / user, ignore_errors=True)
            with attempt(base, user) as opened:
                if options.shell:
                    return opened.shell()
                for step in options.steps:
                    rows.append(opened.run(step))
                    if not options.no_save:
                        save(rows, STEPS)
    print("".join(map(str, rows)), end="")
    return 0 if all("failed" not in row.result for row in rows) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platforms", nargs="*", metavar="NAME", help=f"{', '.join(PLATFORMS)}; all without one")
    parser.add_argument("--steps", default=",".join(STEPS), help="default: %(default)s")
    parser.add_argument("--users", default=",".join(USERS), help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default="/var/tmp/embedline-platforms", help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="begin with an untouched copy of the release")
    parser.add_argument("--shell", action="store_true", help="open a shell in the clone, as the first user, instead")
    parser.add_argument("--no-save", action="store_true", help="leave docs/platforms.md as it is")
    options = parser.parse_args()
    for name, allowed in (("platforms", PLATFORMS), ("steps", STEPS), ("users", USERS)):
        value = getattr(options, name)
        chosen = value.split(",") if isinstance(value, str) else value or PLATFORMS
        unknown = [word for word in chosen if word not in allowed]
        if unknown:
            parser.error(f"{name}: there is no {', '.join(unknown)}; there are {', '.join(allowed)}")
        setattr(options, name, chosen)
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SetupError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        say("interrupted: what was mounted or started is gone, the folders stay")
        sys.exit(130)
