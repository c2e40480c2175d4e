"""The questions of `make demo` have their answers first, with either model."""

from __future__ import annotations

import psycopg
import pytest

from embedline.dev.demo.demos import DEMOS
from embedline.dev.demo.manual import manual_folder, read_pages
from support import create_pipeline, scalar, searching, settle

# The pages that came second and third among all of the manual's, so that a few pages are as hard as all of them.
_RIVALS = {
    "static-256": ("sql-altertable.html", "runtime-config-locks.html", "sql-createtable.html", "sql-createpolicy.html"),
    "minilm": (
        "sql-importforeignschema.html", "sql-prepare.html", "sql-createview.html", "sql-reindex.html",
        "sql-commands.html", "sql-createtrigger.html",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", sorted(DEMOS))
def test_the_demo_s_questions_find_the_pages_that_answer_them(database: psycopg.Connection, model: str) -> None:
    demo = DEMOS[model]
    question, answer = demo.filtered_question
    wanted = {page for answers in demo.questions.values() for page in answers} | {answer, *_RIVALS[model]}
    pages = [page for page in read_pages(manual_folder(database.info.server_version // 10000)) if page.name in wanted]
    assert len(pages) == len(wanted)
    database.execute("CREATE TABLE page (name text PRIMARY KEY, title text, body text)")
    with database.cursor() as cursor:
        rows = [(page.name, page.title, page.body) for page in pages]
        cursor.executemany("INSERT INTO page VALUES (%s, %s, %s)", rows)
    create_pipeline(database, model=model)
    settle(database, 240)
    assert scalar(database, "SELECT count(DISTINCT name) FROM page_embedding") == len(pages)
    for text, answers in demo.questions.items():
        assert searching(database, "page", text, 1)[0][0] in answers, text
    filtered = (
        "SELECT name FROM page_embedding WHERE title LIKE %s"
        " ORDER BY embedding <=> (SELECT embedline.embed_query('page', %s)) LIMIT 1"
    )
    assert scalar(database, filtered, (demo.title_pattern, question)) == answer
