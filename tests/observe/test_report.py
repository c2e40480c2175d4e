"""The report: its figures, and the page as a browser shows it."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from axe_playwright_python.sync_playwright import Axe
from lxml import html
from PIL import Image, ImageStat
from playwright.sync_api import Browser, Page, sync_playwright
from psycopg import conninfo
from rich.console import Console

import programs
from conftest import MakeRole
from embedline.dev.cluster.system import BROWSERS
from embedline.dev.demo import report as demo_report
from reporting import MARK, furnish, vectors, write_report
from stub_provider import StubProvider
from support import create_pages, create_pipeline, drain, scalar
from working import create_stub_model, create_stub_pipeline, dsn_of

_SECTIONS = [
    "attention", "pipelines", "throughput", "quality", "evidence", "spending", "dead-letters", "versions",
]  # fmt: skip
_GRAVE = ("serious", "critical")
# A phone, a tablet, a desk.
_WIDTHS = (390, 768, 1280)


@pytest.fixture(scope="module")
def furnished(module_database: psycopg.Connection, running_stub: StubProvider) -> psycopg.Connection:
    """A database with all that a report tells of."""
    furnish(module_database, running_stub)
    return module_database


@pytest.fixture(scope="module")
def page_path(furnished: psycopg.Connection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of that database."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(furnished, path)
    return path


def _sections(page: str) -> list[str]:
    return [str(heading.get("id")) for heading in html.fromstring(page).iter("h2")]


def _cells(page: str, caption: str) -> list[list[str]]:
    """Return the cells of the table of this caption."""
    tables = [table for table in html.fromstring(page).iter("table") if table.findtext("caption") == caption]
    assert len(tables) == 1, caption
    return [[" ".join(cell.text_content().split()) for cell in row] for row in tables[0].find("tbody")]


def _json(connection: psycopg.Connection, *options: str) -> dict[str, Any]:
    done = programs.run("embedline", "report", "--json", "--dsn", dsn_of(connection), *options)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_no_text_no_key_and_no_vector_is_in_the_report(furnished: psycopg.Connection, page_path: Path) -> None:
    # The words are there to be found: in the source, in the queue's errors, in the evidence of the gate.
    for query in ("SELECT last_error FROM embedline.status", "SELECT string_agg(message, '') FROM embedline.dead_letter",
                  "SELECT evidence::text FROM embedline.evaluation WHERE kind = 'gate'"):  # fmt: skip
        assert MARK in str(scalar(furnished, query))
    for shown in (page_path.read_text(encoding="utf-8"), json.dumps(_json(furnished))):
        assert "EL012" in shown
        assert MARK not in shown
        assert not [component for component in vectors(furnished) if component in shown]


def test_each_section_shows_its_figures(furnished: psycopg.Connection, page_path: Path) -> None:
    page = page_path.read_text(encoding="utf-8")
    assert _sections(page) == _SECTIONS
    alerts = furnished.execute("SELECT severity, alert, subject FROM embedline.alert").fetchall()
    assert sorted(tuple(row[:3]) for row in _cells(page, "Alerts, the gravest first")) == sorted(alerts)
    assert _cells(page, "Pipelines")[0][:6] == ["page", "page", "static-256", "active", "100 %", "valid"]
    assert [row[2:] for row in _cells(page, "Versions")] == [
        ["complete", "valid", "–", *row[5:]] if number == 1 else ["serves", "valid", "inconclusive", *row[5:]]
        for number, row in enumerate(_cells(page, "Versions"), 1)
    ]
    assert sorted(row[1:4] + row[5:] for row in _cells(page, "Dead letters, the most frequent reason first")) == [
        ["chunks of version 1", "embed", "EL012", "3"], ["rows", "validate", "EL002", "1"],
    ]  # fmt: skip
    assert _cells(page, "Cutovers and rollbacks of the period")[0][:2] == ["page", "cutover from version 1 to 2"]


def test_throughput_is_that_of_the_view(furnished: psycopg.Connection, page_path: Path) -> None:
    query = "SELECT sum(chunks) FROM embedline.throughput WHERE hour >= date_trunc('day', now(), 'UTC') - interval '29 days'"
    chunks = int(scalar(furnished, query))
    found = _cells(page_path.read_text(encoding="utf-8"), "Chunks of page")
    assert len(found) == 30
    assert sum(int(value.replace(",", "")) for _, value in found) == chunks > 10000
    # A day without work has a place, too.
    assert [value for _, value in found].count("0") == 1


def test_the_evidence_has_both_models_with_their_intervals(furnished: psycopg.Connection, page_path: Path) -> None:
    rows = {row[0]: row[1:] for row in _cells(page_path.read_text(encoding="utf-8"), "Both models of the gate")}
    stored = scalar(furnished, "SELECT evidence -> 'rows' FROM embedline.evaluation WHERE kind = 'gate'")
    told = {row["measure"]: row for row in stored}
    for name in ("nDCG@10", "recall@10", "MRR@10"):
        old, old_interval, new, new_interval, _, interval, _ = rows[name]
        assert [float(old), float(new)] == [round(told[name][side], 3) for side in ("old", "new")]
        # The gate tells them in its words.
        assert f"old [{old_interval.replace(' to ', ', ')}]" in told[name]["detail"]
        assert f"new [{new_interval.replace(' to ', ', ')}]" in told[name]["detail"]
        assert interval == f"{told[name]['low']:.3f} to {told[name]['high']:.3f}".replace("-", "−")
    assert {"index recall@10", "embedding p95 ms", "search p95 ms"} <= rows.keys()
    assert rows["dimensions"][0::2][:2] == ["8", "256"]
    assert all(rows["vectors, size"][place].endswith("kB") for place in (0, 2))
    # Those of groups bear values of the source.
    assert not any("title" in name for name in rows)


def test_recall_over_time_is_that_of_the_view(database: psycopg.Connection, stub: StubProvider, tmp_path: Path) -> None:
    create_stub_model(database, stub)
    create_stub_pipeline(database, rows=60)
    drain(database)
    database.execute("CREATE TABLE canary AS SELECT body AS query, id::text AS key FROM page")
    database.execute("SELECT embedline.set_canaries('page', 'canary')")
    database.execute("SELECT * FROM embedline.check_quality('page')")
    database.execute("UPDATE embedline.quality_check SET measured_at = measured_at - interval '1 day'")
    database.execute("DELETE FROM page WHERE id % 3 = 0")
    database.execute("SELECT * FROM embedline.check_quality('page')")
    path = tmp_path / "report.html"
    write_report(database, path)
    shown = _cells(path.read_text(encoding="utf-8"), "Recall@10 of page")
    query = "SELECT value FROM embedline.quality WHERE kind = 'canary' ORDER BY measured_at"
    found = [f"{value:.3f}" for (value,) in database.execute(query)]
    assert found == ["1.000", "0.667"]
    assert [row[3] for row in shown if row[1] == "of the canaries"] == found


def test_a_preview_is_told_from_a_gate(page_path: Path) -> None:
    page = html.fromstring(page_path.read_text(encoding="utf-8"))
    assert [heading.text for heading in page.iter("h3") if str(heading.text).startswith("page")] == [
        "page: version 2 (static-256) against version 1 (stub)",
        "page: preview of static-256 beside stub",
    ]
    assert "understates the new model, and opens no cutover" in page.text_content()


def test_spending_stands_beside_its_budget(furnished: psycopg.Connection, page_path: Path) -> None:
    page = page_path.read_text(encoding="utf-8")
    name, amount, spent = furnished.execute(
        "SELECT scope || ' ' || name || ', ' || unit || ' a ' || period, amount, spent FROM embedline.budget WHERE unit = 'money'"
    ).fetchone() or ("", 0, 0)
    row = next(row for row in _cells(page, "Budgets, the scarcest first") if row[0] == name)
    assert float(row[3]) == pytest.approx(float(spent), abs=0.006)
    assert float(row[6]) == float(amount)
    # The text beside the bar, and the bar's own title and description.
    assert row[2].endswith(f"{100 * spent / amount:.0f} %")
    assert sum(float(value) for _, value in _cells(page, "Money of model stub")) > 20


def test_recall_is_that_of_the_gate_while_there_is_no_series(page_path: Path, furnished: psycopg.Connection) -> None:
    rows = _cells(page_path.read_text(encoding="utf-8"), "Recall@10 of page")
    told = scalar(furnished, "SELECT evidence -> 'rows' -> 1 FROM embedline.evaluation WHERE kind = 'gate'")
    assert told["measure"] == "index recall@10"
    interval = f"{told['low']:.3f} to {told['high']:.3f}"
    assert [row[1:] for row in rows] == [["of the index, real queries", "2", f"{told['new']:.3f}", interval]]


def test_json_has_the_same_figures_and_writes_no_file(furnished: psycopg.Connection, tmp_path: Path) -> None:
    done = programs.run("embedline", "report", "--json", "--days", "7", "--dsn", dsn_of(furnished), cwd=tmp_path)
    found = json.loads(done.stdout)
    assert not list(tmp_path.iterdir())
    assert found["scope"]["days"] == 7
    assert len(found["work"]) in (6, 7)
    assert [row["count"] for row in found["dead_letters"]] == [3, 1]
    assert {row["kind"]: row["baseline_model"] for row in found["evaluations"]} == {"gate": "stub", "preview": "stub"}
    assert found["unreadable"] == []


@pytest.mark.parametrize(("days", "steps"), [(1, 24), (2, 48), (45, 45), (90, 13), (365, 53)])
def test_a_longer_period_has_longer_steps(furnished: psycopg.Connection, tmp_path: Path, days: int, steps: int) -> None:
    page = write_report(furnished, tmp_path / "report.html", "--days", str(days))
    assert len(_cells(page, "Chunks of page")) == steps


def test_a_reader_sees_fewer_sections_and_is_told(
    furnished: psycopg.Connection, make_role: MakeRole, role_passwords: dict[str, str], tmp_path: Path
) -> None:
    for group, missing in (("embedline_reader", {"evidence", "dead-letters"}), ("embedline_admin", set())):
        role = make_role(group)
        dsn = conninfo.make_conninfo(dsn_of(furnished), user=role, password=role_passwords[role])
        page = write_report(furnished, tmp_path / "report.html", dsn=dsn)
        assert _sections(page) == [name for name in _SECTIONS if name not in missing], group
        assert ("A member of embedline_admin sees all sections." in page) == bool(missing)
        assert MARK not in page
        assert _cells(page, "Versions")[1][-4] != "–", "the sizes are shown to both"


def test_a_role_without_rights_is_told_so(
    furnished: psycopg.Connection, make_role: MakeRole, role_passwords: dict[str, str], tmp_path: Path
) -> None:
    role = make_role()
    dsn = conninfo.make_conninfo(dsn_of(furnished), user=role, password=role_passwords[role])
    done = programs.run("embedline", "report", "--dsn", dsn, cwd=tmp_path)
    assert done.returncode == 1
    assert "permission denied for schema embedline" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_installation_without_pipelines_has_a_report(database: psycopg.Connection, tmp_path: Path) -> None:
    page = write_report(database, tmp_path / "report.html")
    assert _sections(page) == _SECTIONS
    assert "There is no pipeline yet." in page


def test_names_are_text_and_never_markup(database: psycopg.Connection, tmp_path: Path) -> None:
    name = "<script>alert(1)</script>\"'&"
    create_pages(database, 3)
    database.execute("ALTER TABLE page RENAME TO " + '"' + name.replace('"', '""') + '"')
    create_pipeline(database, source='"' + name.replace('"', '""') + '"')
    page = write_report(database, tmp_path / "report.html")
    assert not list(html.fromstring(page).iter("script", "img", "link"))
    assert name in _cells(page, "Pipelines")[0][1].replace('""', '"')


def test_a_file_that_cannot_be_written_ends_the_command(furnished: psycopg.Connection, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "report.html"
    done = programs.run("embedline", "report", "--dsn", dsn_of(furnished), "--output", str(path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {path} cannot be written: No such file or directory\nHINT: ")
    folder = tmp_path / "folder"
    folder.mkdir()
    done = programs.run("embedline", "report", "--dsn", dsn_of(furnished), "--output", str(folder))
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == [folder], "nothing half written is left"


def test_all_is_read_in_one_snapshot_that_writes_nothing(database: psycopg.Connection, tmp_path: Path) -> None:
    create_pages(database, 1)
    create_pipeline(database)
    database.execute("""
        CREATE OR REPLACE FUNCTION embedline._workers_alive() RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN
            RAISE EXCEPTION '% % %', current_setting('transaction_isolation'),
                current_setting('transaction_read_only'), current_setting('timezone');
        END $$
    """)
    done = programs.run("embedline", "report", "--dsn", dsn_of(database), cwd=tmp_path)
    assert done.stderr.startswith("error: repeatable read on UTC")


def test_a_demo_says_where_its_report_is(furnished: psycopg.Connection, tmp_path: Path) -> None:
    told = io.StringIO()
    demo_report.write_report(dsn_of(furnished), tmp_path / ".build/report.html", Console(file=told, width=40))
    address = told.getvalue().split()[-1]
    assert address == (tmp_path / ".build/report.html").as_uri()
    assert _sections((tmp_path / ".build/report.html").read_text(encoding="utf-8")) == _SECTIONS


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium.

    Without one the tests are skipped, and fail for root, who could have installed it.
    """
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        message = f"needs a browser: apt-get install --no-install-recommends {BROWSERS[0]}"
        pytest.fail(message) if os.geteuid() == 0 else pytest.skip(message)
    with sync_playwright() as playwright:
        # In a container /dev/shm may be too small for a page.
        browser = playwright.chromium.launch(executable_path=program, args=["--disable-dev-shm-usage"])
        yield browser
        browser.close()


Open = Callable[[str, int], Page]


@pytest.fixture
def open_page(browser: Browser, page_path: Path) -> Iterator[Open]:
    """Open the page in a colour scheme and at a width.

    Any request, message or error in it fails the test.
    """
    contexts, said = [], []

    def _open(scheme: str, width: int) -> Page:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 844}, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        page.goto(page_path.as_uri())
        return page

    yield _open
    for context in contexts:
        context.close()
    assert set(said) == {page_path.as_uri()}


@pytest.mark.faults
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_and_has_the_colours_of_its_scheme(open_page: Open, scheme: str) -> None:
    for width in _WIDTHS:
        page = open_page(scheme, width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # With its tables of values open, too.
        page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        seen = page.screenshot(full_page=True)
        if folder := os.environ.get("EMBEDLINE_SCREENSHOTS"):
            (Path(folder) / f"report-{scheme}-{width}.png").write_bytes(seen)
        brightness = ImageStat.Stat(Image.open(io.BytesIO(seen)).convert("L")).mean[0]
        assert brightness > 200 if scheme == "light" else brightness < 60


@pytest.mark.faults
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_reader_of_screens_meets_no_serious_fault(open_page: Open, scheme: str) -> None:
    for width in (_WIDTHS[0], _WIDTHS[-1]):
        page = open_page(scheme, width)
        page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
        result = Axe().run(page).response
        assert {rule["id"] for rule in result["passes"]} >= {"color-contrast", "svg-img-alt"}
        found = [(rule["id"], rule["nodes"][0]["html"]) for rule in result["violations"] if rule["impact"] in _GRAVE]
        assert not found


@pytest.mark.faults
def test_every_chart_has_a_name_a_description_and_its_values(open_page: Open) -> None:
    page = open_page("light", 1280)
    charts = page.get_by_role("img")
    assert charts.count() == page.locator("svg[role=img]").count() > 5
    for chart in charts.all():
        assert chart.locator("> title").text_content()
        assert chart.locator("> desc").text_content()
    assert page.locator("figure").count() == page.locator("figure table.values").count() > 3
    # Each bar and each letter lies within its chart.
    outside = """() => [...document.querySelectorAll('svg.chart')].flatMap(chart => {
        const box = chart.getBoundingClientRect();
        return [...chart.querySelectorAll('rect, text, circle, polygon, line')].filter(part => {
            const found = part.getBoundingClientRect();
            return found.left < box.left - 1 || found.right > box.right + 1
                || found.top < box.top - 1 || found.bottom > box.bottom + 1;
        }).map(part => part.outerHTML);
    })"""
    assert page.evaluate(outside) == []
