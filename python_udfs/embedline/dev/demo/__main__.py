"""Run `make demo`, or with an option another demo.

EMBEDLINE_DSN names the database.
"""

from __future__ import annotations

import argparse
import os
import sys

import psycopg
from rich.console import Console

from embedline.dev.cluster.settings import load_settings
from embedline.dev.demo.demos import DEMOS
from embedline.dev.demo.finetune import run_finetune
from embedline.dev.demo.images import run_images
from embedline.dev.demo.manual import ManualNotFound
from embedline.dev.demo.report import write_report
from embedline.dev.demo.run import DemoFailed, run_demo
from embedline.dev.demo.upgrade import run_upgrade


def main() -> int:
    """Run the demo; return 0 if it keeps its promises, else 1."""
    parser = argparse.ArgumentParser(prog="make demo", description="Make the PostgreSQL manual searchable by meaning.")
    parser.add_argument("--model", choices=sorted(DEMOS), default="static-256")
    parser.add_argument("--upgrade", action="store_true", help="upgrade a pipeline's model under traffic instead")
    parser.add_argument("--finetune", action="store_true", help="train a model of one's own instead")
    parser.add_argument(
        "--images", action="store_true", help="search emoji and icons by words and by a picture instead"
    )
    options = parser.parse_args()
    dsn = os.environ.get("EMBEDLINE_DSN")
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if not dsn:
        errors.print("error: EMBEDLINE_DSN is not set; run: make demo", markup=False)
        return 1
    try:
        settings = load_settings()
        report = settings.root / ".build/report.html"
        if options.images:
            shortfalls = run_images(dsn, settings.models, settings.root / ".build/emoji.html", console)
        elif options.finetune:
            shortfalls = run_finetune(dsn, console)
        elif options.upgrade:
            shortfalls = run_upgrade(dsn, console)
        else:
            shortfalls = run_demo(dsn, DEMOS[options.model], console)
        if not options.images:
            write_report(dsn, report, console)
    except (DemoFailed, ManualNotFound) as error:
        errors.print(f"error: {error}", markup=False)
        return 1
    except psycopg.Error as error:
        lines = [f"error: {error.diag.message_primary or error}", error.diag.message_detail, error.diag.message_hint]
        errors.print("\n".join(line for line in lines if line), markup=False)
        return 1
    except KeyboardInterrupt:
        errors.print("interrupted")
        return 130
    for shortfall in shortfalls:
        errors.print(f"error: {shortfall}", markup=False)
    return 1 if shortfalls else 0


if __name__ == "__main__":
    sys.exit(main())
