"""The demos: their models, pages and questions, and the figures that they promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Demo:
    """The differences between the models: pages and questions.

    Each question stands with the pages that answer it; tests hold the search to them. `required_recall` has the promised
    figures by mode.
    """

    model: str
    name: str
    page_prefix: str
    questions: Mapping[str, tuple[str, ...]]
    filtered_question: tuple[str, str]
    title_pattern: str
    edited_page: str
    deleted_page: str
    required_recall: Mapping[str, float]
    required_visible_seconds: float | None


DEMOS = {
    "static-256": Demo(
        model="static-256",
        name="manual",
        page_prefix="",
        questions={
            "recover a database to an earlier point in time from archived WAL": (
                "continuous-archiving.html",
                "wal-intro.html",
            ),
            "row-level security policies for multi-tenant tables": ("ddl-rowsecurity.html",),
            "deadlock between two transactions": ("explicit-locking.html",),
            "partition a large table by date range": ("ddl-partitioning.html",),
        },
        filtered_question=("insert a row or update it if it exists already", "sql-insert.html"),
        title_pattern="INSERT%",
        edited_page="storage-init.html",
        deleted_page="sql-vacuum.html",
        required_recall={"vector": 0.70, "keyword": 0.89, "hybrid": 0.90},
        required_visible_seconds=1.0,
    ),
    "minilm": Demo(
        model="minilm",
        name="manual_commands",
        page_prefix="sql-",
        questions={
            "why is my query slow, show the execution plan": ("sql-explain.html",),
            "import a CSV file into a table": ("sql-copy.html",),
            "receive a notification when another session sends one": ("sql-notify.html", "sql-listen.html"),
            "restrict which rows a user can see": ("sql-createpolicy.html",),
        },
        filtered_question=("build an index without blocking writers", "sql-createindex.html"),
        title_pattern="CREATE %",
        edited_page="sql-dropuser.html",
        deleted_page="sql-vacuum.html",
        required_recall={},
        required_visible_seconds=None,
    ),
}
