"""The batch endpoint of the stub: files, and batches that stay open until they are told to end.

OpenAI's form: POST /files (multipart), POST and GET /batches, GET /batches/ID, POST /batches/ID/cancel, GET /files/ID/content,
DELETE /files/ID. A batch takes its texts when it ends, and only then are they paid for.

`behave` forgets what was set before and sets `is_open` (batches do not end by themselves), and the ways to fail:
`outcomes` of the next batches ("failed", "expired", "cancelled"; then "completed"), `reason` (code, message, line) of a
failed one, `answered` (share of the texts that an expired or cancelled batch has), `lines` (what happens to texts with
a certain part, as {"part": "refused" | "trouble" | "missing" | "twice" | "narrow" | "nan" | "garbage"
| "half" (of a character in its error) | "nul" (in its error) | "long number"}), `status`
({"POST /v1/batches": [500, times]}: calls that fail), `swallow` (calls whose answer never leaves: the connection is
closed after the work is done).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

Answer = tuple[int, bytes, bytes]
_CLOSED = b"closed"


class Batches:
    """The files and batches of one stub."""

    def __init__(self, dimensions: int, vector: Callable[[str], str], pay: Callable[[str], None]) -> None:
        self.dimensions, self.vector, self.pay = dimensions, vector, pay
        self.behaviour: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        # The texts of each batch, whose file may be deleted meanwhile.
        self.texts: dict[str, list[str]] = {}
        self.calls: list[str] = []
        self.number = 0

    def answer(self, method: str, path: str, body: bytes) -> Answer | None:
        """Answer a call of the batch endpoint or about it; None if it is none."""
        if path.startswith("/batch_api/"):
            return 200, json.dumps(self.told(path.rpartition("/")[2], body)).encode(), b""
        path, _, query = path.partition("?")
        if not re.match(r"/v1/(files|batches)(/|$)", path):
            return None
        call = f"{method} {re.sub(r'(batch|file)_[0-9]+', 'ID', path)}"
        self.calls.append(call)
        failing = self.behaviour.get("status", {}).get(call)
        if failing and failing[1] > 0:
            failing[1] -= 1
            return failing[0], b'{"error": {"message": "not now"}}', b""
        found = self.call(method, path, query, body)
        swallowed = self.behaviour.get("swallow", {})
        if swallowed.get(call, 0) > 0:
            swallowed[call] -= 1
            return 500, b"", _CLOSED
        if found is None:
            return 404, b'{"error": {"message": "there is none"}}', b""
        return 200, found if isinstance(found, bytes) else json.dumps(found).encode(), b""

    def told(self, what: str, body: bytes) -> Any:
        """Do as the test says, or tell it."""
        if what == "behave":
            self.behaviour, self.calls = json.loads(body), []
            self.files, self.batches = {}, {}
        if what == "end":
            self.behaviour |= {"is_open": False, **json.loads(body)}
        if what == "calls":
            return self.calls
        return [{**batch, "texts": self.texts[number]} for number, batch in self.batches.items()]

    def call(self, method: str, path: str, query: str, body: bytes) -> Any:
        """Do what is asked for."""
        parts = path.split("/")[2:]
        if parts == ["files"]:
            return {"id": self.keep(_uploaded(body)), "object": "file"}
        if parts == ["batches"] and method == "POST":
            return self.create(json.loads(body))
        if parts == ["batches"]:
            return self.page(query)
        kept = (self.files if parts[0] == "files" else self.batches).get(parts[1])
        if kept is None:
            return None
        if parts[0] == "files":
            if method == "DELETE":
                del self.files[parts[1]]
                return {"id": parts[1], "deleted": True}
            return self.files[parts[1]]
        if parts[2:] == ["cancel"]:
            self.batches[parts[1]] |= {"status": "cancelled"}
        self.advance(self.batches[parts[1]])
        return self.batches[parts[1]]

    def keep(self, content: bytes) -> str:
        """Keep a file; return its number."""
        self.number += 1
        self.files[f"file_{self.number}"] = content
        return f"file_{self.number}"

    def create(self, given: dict[str, Any]) -> dict[str, Any]:
        """Begin a batch."""
        assert given["endpoint"] == "/v1/embeddings"
        assert given["completion_window"] == "24h"
        self.number += 1
        batch = {
            "id": f"batch_{self.number}",
            "object": "batch",
            "status": "validating",
            "input_file_id": given["input_file_id"],
            "metadata": given.get("metadata"),
        }
        self.batches[batch["id"]] = batch
        self.texts[batch["id"]] = [line["body"]["input"] for line in self.lines_of(batch)]
        return batch

    def page(self, query: str) -> dict[str, Any]:
        """Return a page of the batches, the latest first."""
        limit = int(re.search(r"limit=([0-9]+)", query + "&limit=20").group(1))  # type: ignore[union-attr]
        after = re.search(r"after=([a-z_0-9]+)", query)
        numbers = list(self.batches)[::-1]
        rest = numbers[numbers.index(after.group(1)) + 1 :] if after else numbers
        return {"data": [self.batches[number] for number in rest[:limit]], "has_more": len(rest) > limit}

    def lines_of(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the requests of a batch."""
        return [json.loads(line) for line in self.files.get(batch["input_file_id"], b"").splitlines()]

    def advance(self, batch: dict[str, Any]) -> None:
        """End a batch that is to end now."""
        if batch["status"] == "validating":
            batch["status"] = "in_progress"
        if batch["status"] != "in_progress" or self.behaviour.get("is_open"):
            return
        outcome = (self.behaviour.get("outcomes") or ["completed"]).pop(0)
        if outcome == "failed":
            code, message, line = self.behaviour["reason"]
            batch |= {"status": outcome, "errors": {"data": [{"code": code, "message": message, "line": line}]}}
            return
        answered: list[bytes] = []
        failed: list[bytes] = []
        lines = self.lines_of(batch)
        count = round(len(lines) * (1.0 if outcome == "completed" else self.behaviour.get("answered", 0.0)))
        for place, line in enumerate(lines):
            if place < count:
                self.take(line, answered, failed)
            else:
                error = {"code": f"batch_{outcome}", "message": "it came too late"}
                failed.append(_line(line["custom_id"], None, error))
        # In another order than they were sent in.
        batch |= {"status": outcome, "output_file_id": self.keep(b"\n".join(answered[::-1]))}
        if failed:
            batch["error_file_id"] = self.keep(b"\n".join(failed))

    def take(self, line: dict[str, Any], answered: list[bytes], failed: list[bytes]) -> None:
        """Answer one text."""
        text, custom_id = line["body"]["input"], line["custom_id"]
        lines = self.behaviour.get("lines", {})
        fault = next((what for part, what in lines.items() if part in text), None)
        if fault == "missing":
            return
        if fault == "long number":
            answered.append(_line("9" * 5000, {"status_code": 400, "body": {}}))
            fault = "refused"
        odd = {"nul": "no\0 such input", "half": "no \ud83d such input"}
        if fault in odd:
            failed.append(_line(custom_id, {"status_code": 400, "body": {"error": {"message": odd[fault]}}}))
            return
        if fault in ("refused", "trouble"):
            error = {"error": {"message": f"this input is {fault}"}}
            failed.append(_line(custom_id, {"status_code": 400 if fault == "refused" else 500, "body": error}))
            return
        vector = self.vector(text)
        if fault == "garbage":
            answered.append(b"{cut in the mid")
            return
        if fault == "nan":
            vector = base64.b64encode(np.full(self.dimensions, np.nan, "<f4").tobytes()).decode()
        elif fault == "narrow":
            vector = base64.b64encode(base64.b64decode(vector)[:-4]).decode()
        else:
            self.pay(text)
        tokens = len(text) // 4 + 1
        body = {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": vector}],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        answered.append(_line(custom_id, {"status_code": 200, "body": body}))
        if fault == "twice":
            body["data"][0]["embedding"] = self.vector("another text")  # type: ignore[index]
            # It stands behind the right one, because the order is turned.
            answered.insert(0, _line(custom_id, {"status_code": 200, "body": body}))


def _line(custom_id: str, response: Any, error: Any = None) -> bytes:
    return json.dumps({"id": "x", "custom_id": custom_id, "response": response, "error": error}).encode()


def _uploaded(body: bytes) -> bytes:
    """Return the file of a multipart form."""
    boundary = body.split(b"\r\n", 1)[0]
    for part in body.split(boundary):
        head, _, content = part.partition(b"\r\n\r\n")
        if b'name="file"' in head:
            return content.removesuffix(b"\r\n")
    return b""
