"""The server of metrics, Prometheus and Alertmanager, each in its own process."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import programs
from embedline.dev.cluster import monitors
from embedline.dev.cluster.settings import load_settings
from support import ROOT, free_port, wait_until

RULES = ROOT / "ops" / "prometheus" / "alerts.yml"


def program(name: str) -> str:
    """Return the path of one of Debian's programs."""
    path = monitors.program(load_settings(), name)
    assert path.exists(), f"{path} is missing: run make _test-setup"
    return str(path)


def promtool(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run promtool."""
    return subprocess.run(
        [program("promtool"), *arguments], input=text, capture_output=True, text=True, timeout=60, check=False
    )


@contextlib.contextmanager
def _process(arguments: Sequence[str], folder: Path, ready: str) -> Iterator[None]:
    log = folder / f"{Path(arguments[0]).name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=file, cwd=folder)
    try:
        wait_until(lambda: process.poll() is not None or _answers(ready), 60, f"{arguments[0]} answers")
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def serving(dsn: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Serve the metrics for the length of a block; yield address and messages."""
    messages = folder / "messages"
    descriptor = os.open(messages, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    environment = {**os.environ, "EMBEDLINE_DSN": dsn}
    arguments = ["metrics", "--listen", "127.0.0.1:0"]
    process = programs.Process("embedline", arguments, env=environment, stdout=descriptor, stderr=descriptor)
    os.close(descriptor)
    try:
        wait_until(lambda: "serving" in messages.read_text(), 30, "the server listens")
        found = re.search(r"http://127\.0\.0\.1:\d+/metrics", messages.read_text())
        assert found is not None
        yield found[0], messages
    finally:
        process.terminate()
        code = process.wait(20)
    assert code == 0


def get(url: str, **headers: str) -> tuple[int, str, bytes]:
    """Return status, content type and body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read()


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query; fail with the message if it is refused."""
        asked = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{asked}", timeout=10) as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
                return found
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from None

    def value(self, expression: str) -> float | None:
        """Return the value of the first sample, None without one."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else None


@contextlib.contextmanager
def prometheus(target: str, folder: Path, alertmanager_port: int | None = None) -> Iterator[Prometheus]:
    """Run a Prometheus that reads a target each second, with the rules of ops/."""
    port = free_port()
    config: dict[str, Any] = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "embedline", "static_configs": [{"targets": [target]}]}],
    }
    if alertmanager_port is not None:
        targets = [{"targets": [f"127.0.0.1:{alertmanager_port}"]}]
        config["alerting"] = {"alertmanagers": [{"static_configs": targets}]}
    # JSON is YAML.
    (folder / "prometheus.yml").write_text(json.dumps(config))
    arguments = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with _process(arguments, folder, f"http://127.0.0.1:{port}/-/ready"):
        yield Prometheus(f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def alertmanager(webhook: str, folder: Path) -> Iterator[int]:
    """Run an Alertmanager that sends each alert to a webhook at once; yield its port."""
    port = free_port()
    config = {
        "route": {"receiver": "webhook", "group_by": ["..."], "group_wait": "0s", "group_interval": "1s"},
        "receivers": [{"name": "webhook", "webhook_configs": [{"url": webhook, "send_resolved": True}]}],
    }
    (folder / "alertmanager.yml").write_text(json.dumps(config))
    arguments = [
        program("prometheus-alertmanager"),
        f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
        "--log.level=warn",
    ]
    with _process(arguments, folder, f"http://127.0.0.1:{port}/-/ready"):
        yield port


@contextlib.contextmanager
def receiver() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Take POST requests; yield the address and the list of their paths and bodies."""
    received: list[tuple[str, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", received
        server.shutdown()
        thread.join()
