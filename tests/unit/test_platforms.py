"""How `make platforms` reads the pages on installation and removal, and how its table keeps what was not measured again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from platforms import container, operations, table
from platforms.table import Row

ROOT = Path(__file__).resolve().parents[2]
INSTALL = """# Install on an existing server

1. Say which:

   ```sh
   export PG=17 # adapt
   ```

2. Install:

   ```sh
   apt-get install --yes "postgresql-$PG"
   apt-get install --yes "postgresql-$PG-pgvector"
   ```

   ```ini
   not_a_command = on
   ```

   ```sql
   SELECT embedline.schedule_workers(1);
   ```
"""

REMOVE = """# Remove Embedline

```postgresql
of_another_database();
```

```sh
rm -rf /opt/embedline
```
"""


def test_the_page_s_commands_run_in_their_order() -> None:
    script = operations.script(INSTALL, REMOVE, pgvector_package=True)
    commands = [
        "\nexport PG=$major # adapt\n",
        '\napt-get install --yes "postgresql-$PG-pgvector"\n',
        "ON_ERROR_STOP=1 \"$DB\" <<'SQL'\nSELECT embedline.schedule_workers(1);\nSQL\n",
        "\nINSERT INTO platform_page",
        "\nrm -rf /opt/embedline\n",
    ]
    places = [script.index(command) for command in commands]
    assert places == sorted(places)
    assert "not_a_command" not in script
    assert "of_another_database" not in script


def test_only_the_line_of_a_package_that_is_not_offered_is_left_out() -> None:
    script = operations.script(INSTALL, REMOVE, pgvector_package=False)
    assert '"postgresql-$PG"' in script
    assert "pgvector" not in script


@pytest.mark.parametrize(
    ("install", "remove", "name"), [("", REMOVE, "install.md"), (INSTALL, REMOVE.replace("```sh", "```"), "remove.md")]
)
def test_a_page_without_the_commands_is_refused(install: str, remove: str, name: str) -> None:
    with pytest.raises(SystemExit, match=name):
        operations.script(install, remove, pgvector_package=True)


def test_a_row_takes_the_place_of_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "platforms.md"
    header = table._HEADER
    page.write_text(f"# Platforms\n\n{header}\nAfter.\n", encoding="utf-8")
    monkeypatch.setattr(table, "PAGE", page)
    steps = ("demo", "test")
    first = Row("Debian 13, PostgreSQL 17.11", "root", "test", "failed (2)", "60", "1.00 GB", "aaaaaaa")
    table.save([first], steps)
    demo = Row("Debian 13, PostgreSQL 17.12", "root", "demo", "passed", "30", "1.00 GB", "bbbbbbb")
    again = Row("Debian 13, PostgreSQL 17.12", "root", "test", "9 passed", "50", "1.00 GB", "bbbbbbb")
    other = Row("Debian 12, PostgreSQL 15.20", "root", "test", "9 passed", "40", "1.00 GB", "bbbbbbb")
    table.save([again, demo], steps)
    table.save([other], steps)
    assert page.read_text(encoding="utf-8") == f"# Platforms\n\n{header}{other}{demo}{again}\nAfter.\n"


def test_the_container_s_steps_are_read_whole() -> None:
    text = (ROOT / container.FILE).read_text(encoding="utf-8")
    assert container.release(text) == "trixie"
    words = [word for word, _ in container.instructions(text)]
    assert words[0] == "FROM"
    assert words.count("RUN") == text.count("\nRUN ")
    script = container.script(text)
    assert "pip install --no-cache-dir" in script
    assert "\\\n" not in script
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
