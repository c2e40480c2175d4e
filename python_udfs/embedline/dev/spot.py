"""Run pgspot on all SQL that an upgrade runs, with the findings that are meant.

    python -m embedline.dev.spot MIGRATIONS

pgspot finds names in SQL that another role could take for its own. It does not read PL/Python.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from embedline.client.install import OWN_NAMES, object_files

# Functions without a search_path of their own.
_WITHOUT_PATH = (
    # Runs its caller's statement, with its caller's rights and search_path; all else in it is qualified.
    "embedline.alter_source(source regclass,statement text)",
    # A trigger of every write; a pinned path would cost more than its work. All in it is qualified.
    "embedline._signal_work()",
)
# Texts of findings that are meant.
_MEANT = (
    # CREATE SCHEMA IF NOT EXISTS, after NO_OWNERS_BESIDES has refused a schema of another role's.
    "PS010: Unsafe schema creation: embedline at",
    # CREATE OR REPLACE in public, after the same check.
    "PS002: Unsafe function creation: public.embed_pending(",
)


def main(migrations: Path) -> int:
    """Print findings that are not meant; return 1 if there are any."""
    objects = [path.read_text(encoding="utf-8") for path in object_files()]
    script = "\n".join([migrations.read_text(encoding="utf-8"), f"{OWN_NAMES};", *objects])
    whole = migrations.with_name("upgrade.sql")
    whole.write_text(script, encoding="utf-8")
    exceptions = [word for name in _WITHOUT_PATH for word in ("--proc-without-search-path", name)]
    command = [str(Path(sys.executable).with_name("pgspot")), "--ignore-lang", "plpython3u", *exceptions, str(whole)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("PS")]
    known = {part: [line for line in lines if part in line] for part in _MEANT}
    found = [line for line in lines if not any(part in line for part in _MEANT)]
    found += [f"pgspot no longer finds what is meant: {part}" for part, places in known.items() if not places]
    if "Errors:" not in done.stdout:
        found.append(f"pgspot did not end: {done.stdout}{done.stderr}")
    print("\n".join([*found, f"{len(found)} findings"]))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
