"""Print the places that tests/unit/test_prose.py counts: `.venv/bin/python tests/prose_faults.py PATH…`."""

from __future__ import annotations

import sys
from pathlib import Path

from prose import ROOT, passages


def main(arguments: list[str]) -> None:
    """Print each retired word, first docstring line and long sentence below the paths given."""
    for argument in arguments:
        given = Path(argument).resolve()
        paths = (
            [path for path in given.rglob("*") if path.suffix in {".py", ".sql", ".md"}] if given.is_dir() else [given]
        )
        for path in sorted(paths):
            for passage in passages(path):
                place = f"{path.relative_to(ROOT)}:{passage.line}"
                for word in passage.retired():
                    print(f"{place}: retired: {word}")
                if passage.bad_first_line():
                    print(f"{place}: first line: {passage.text.splitlines()[0] if passage.text else ''}")
                for sentence in passage.long_sentences():
                    print(f"{place}: long: {sentence}")


if __name__ == "__main__":
    main(sys.argv[1:])
