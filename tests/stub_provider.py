"""An embeddings endpoint in a process of its own: answers at once, after a delay, or wrongly, as it is told.

OpenAI's protocol over HTTP/1.1 with kept connections, on a free port of loopback. A text's vector is known without
asking: `vector_of`. Answers are put together from ready-made pieces, so that a bench measures its client, not this.

Run as a program it serves and prints its port. `StubProvider` starts it, sets its behaviour and reads its counts.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import functools
import json
import random
import subprocess
import sys
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stub_batches import Batches
from stub_rerank import rerank_answer, texts_of

_VECTORS = 4096
FAULTS = ("429", "500", "timeout", "short", "nan")
# What a rule may answer besides a status: wrong vectors for the texts that it matches, wrong answers as a whole.
_WRONG_VALUES = {"nan": float("nan"), "inf": float("inf"), "zero": 0.0}
# In place of headers: the connection is closed without an answer.
_CLOSED = b"closed"
# Headers of an answer that ends before it is whole.
_CUT = b"Connection: close\r\n"


@functools.cache
def _table(dimensions: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(dimensions).standard_normal((_VECTORS, dimensions), dtype=np.float32)


def vector_of(text: str, dimensions: int) -> npt.NDArray[np.float32]:
    """Return the vector that the stub answers for a text; not normalised."""
    vector: npt.NDArray[np.float32] = _table(dimensions)[zlib.crc32(text.encode()) % _VECTORS]
    return vector


@dataclass(frozen=True)
class Asked:
    """A request: when it came (time.monotonic), its size, the status of its answer; None while it has none."""

    came: float
    texts: int
    characters: int
    status: int | None


class StubProvider:
    """The stub as its user sees it."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self._process = subprocess.Popen([sys.executable, __file__, str(dimensions)], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._base = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self.url = f"{self._base}/v1"
        # Of the endpoints that rerank, by form.
        self.rerank_urls = {"tei": self._base, "cohere": f"{self._base}/v2", "jina": self.url, "vllm": self.url}

    def behave(self, **behaviour: Any) -> None:
        """Set `latency` (s), `fault_share` (0 to 1), `faults` (of FAULTS), `poison` (texts with it are answered 400), `moved`.

        The last gives each text the vector of another one, as if the model had been replaced behind its name.

        `rules` are looked through for each request, and the first that fits decides: {"match": a part of one of its texts,
        "over": characters, "longer": characters of one of its texts, "texts_over": texts, "times": requests for which the rule
        holds, "latency": s, "status", "headers", "body"} or with "answer" in place of the status: "nan", "inf" or "zero" as the
        vectors of the texts that
        match, "few" or "more" vectors, "reversed" order, "narrow" vectors, lists of "floats", "html", a body that is "cut",
        "silence", a connection that is "closed" without an answer. A request to rerank has wrong answers of its own, see
        tests/stub_rerank.py; `most_texts` is what it may hold.
        """
        self._call("/behave", json.dumps(behaviour).encode())

    def counts(self) -> dict[str, int]:
        """Return what was asked and answered since the last call: requests, texts, tokens, peak, and each fault."""
        found: dict[str, int] = json.loads(self._call("/counts"))
        return found

    def texts_seen(self) -> dict[str, int]:
        """Return how often each text was embedded with success since the last call; needs behave(remember=True)."""
        found: dict[str, int] = json.loads(self._call("/texts"))
        return found

    def asked(self) -> list[Asked]:
        """Return the requests that came since the last call, in that order."""
        return [Asked(*row) for row in json.loads(self._call("/asked"))]

    def batch_api(self, **behaviour: Any) -> None:
        """Set how the batch endpoint behaves; see tests/stub_batches.py."""
        self._call("/batch_api/behave", json.dumps(behaviour).encode())

    def end_batches(self, **behaviour: Any) -> None:
        """Let the batches end that the endpoint keeps open, and change how it behaves."""
        self._call("/batch_api/end", json.dumps(behaviour).encode())

    def batches(self) -> list[dict[str, Any]]:
        """Return all batches, the latest last, with the `texts` of each."""
        found: list[dict[str, Any]] = json.loads(self._call("/batch_api/batches"))
        return found

    def batch_calls(self) -> list[str]:
        """Return the calls of the batch endpoint since it was told how to behave, as "POST /v1/batches"."""
        found: list[str] = json.loads(self._call("/batch_api/calls"))
        return found

    def last_rerank(self) -> dict[str, Any]:
        """Return the body of the last request to rerank."""
        found: dict[str, Any] = json.loads(self._call("/last_rerank"))
        return found

    def forget(self) -> None:
        """Begin to count anew."""
        for path in ("/counts", "/texts", "/asked"):
            self._call(path)

    def in_flight(self) -> int:
        """Return the number of texts in requests that came since the last `asked` or `forget` and have no answer yet."""
        return int(json.loads(self._call("/in_flight")))

    def _call(self, path: str, body: bytes = b"{}") -> bytes:
        with urllib.request.urlopen(urllib.request.Request(self._base + path, data=body)) as answer:
            return bytes(answer.read())

    def stop(self) -> None:
        """End the process."""
        with self._process:
            self._process.terminate()


@contextlib.contextmanager
def stub_provider(dimensions: int) -> Iterator[StubProvider]:
    """Run a stub for the length of a block."""
    provider = StubProvider(dimensions)
    try:
        yield provider
    finally:
        provider.stop()


class _Server:
    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.rows = [base64.b64encode(row.astype("<f4").tobytes()) for row in _table(dimensions)]
        self.heads = [b'{"object":"embedding","index":%d,"embedding":"' % i for i in range(2048)]
        self.behaviour: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()
        self.texts: Counter[str] = Counter()
        self.asked: list[list[Any]] = []
        self.in_flight = 0
        self.last_rerank: dict[str, Any] = {}
        self.batches = Batches(
            dimensions, lambda text: self.rows[zlib.crc32(text.encode()) % _VECTORS].decode(), self.paid
        )
        self.random = random.Random(1)

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                self.in_flight += 1
                self.counts["peak"] = max(self.counts["peak"], self.in_flight)
                try:
                    status, answer, extra = await self.answer(*lines[0].split(" ")[:2], body)
                finally:
                    self.in_flight -= 1
                if extra == _CLOSED:
                    break
                length = len(answer) * 2 if extra == _CUT else len(answer)
                writer.write(
                    b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n"
                    % (status, length, extra)
                )
                writer.write(answer)
                await writer.drain()
                if extra == _CUT:
                    break
        writer.close()

    async def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes, bytes]:
        if (answer := self.batches.answer(method, path, body)) is not None:
            return answer
        if path == "/behave":
            self.behaviour = json.loads(body)
            self.random.seed(self.behaviour.get("seed", 1))
            return 200, b"{}", b""
        if path == "/counts":
            counts, self.counts = self.counts, Counter()
            return 200, json.dumps(counts).encode(), b""
        if path == "/texts":
            texts, self.texts = self.texts, Counter()
            return 200, json.dumps(texts).encode(), b""
        if path == "/asked":
            asked, self.asked = self.asked, []
            return 200, json.dumps(asked).encode(), b""
        if path == "/in_flight":
            return 200, json.dumps(sum(texts for _, texts, _, status in self.asked if status is None)).encode(), b""
        if path == "/last_rerank":
            return 200, json.dumps(self.last_rerank).encode(), b""
        if path.endswith("/rerank"):
            return await self.rerank(path, json.loads(body))
        if path.startswith("/elsewhere"):
            self.counts["elsewhere"] += 1
        inputs = json.loads(body)["input"]
        request = [time.monotonic(), len(inputs), sum(map(len, inputs)), None]
        self.asked.append(request)
        request[-1], answer, extra = await self.embed(inputs)
        return request[-1], answer, extra

    async def rerank(self, path: str, given: dict[str, Any]) -> tuple[int, bytes, bytes]:
        self.last_rerank, texts = given, texts_of(given)
        self.counts["requests"] += 1
        self.counts["texts"] += len(texts)
        await asyncio.sleep(self.behaviour.get("latency", 0))
        if len(texts) > self.behaviour.get("most_texts", len(texts)):
            return 413, b'{"error": "batch size > maximum allowed batch size", "error_type": "Validation"}', b""
        rule = self.rule_for(texts)
        if rule and ("status" in rule or rule["answer"] in ("silence", "closed", "html")):
            return await self.answer_by(rule, texts, self.texts)
        return *rerank_answer(path, given, rule["answer"] if rule else None), b""

    async def embed(self, texts: Sequence[str]) -> tuple[int, bytes, bytes]:
        self.counts["requests"] += 1
        self.counts["texts"] += len(texts)
        # Of the test that asked: a request that an earlier one left behind is no business of the next.
        seen = self.texts
        latency = self.behaviour.get("latency", 0)
        if latency:
            await asyncio.sleep(latency)
        if rule := self.rule_for(texts):
            return await self.answer_by(rule, texts, seen)
        fault = None
        if self.random.random() < self.behaviour.get("fault_share", 0):
            fault = self.random.choice(self.behaviour.get("faults", FAULTS))
            self.counts[fault] += 1
        poison = self.behaviour.get("poison")
        if poison and any(poison in text for text in texts):
            self.counts["400"] += 1
            return 400, b'{"error": {"message": "this input is refused"}}', b""
        if fault == "429":
            return 429, b'{"error": {"message": "slow down"}}', b"Retry-After: 0.2\r\n"
        if fault == "500":
            return 500, b"<html>broken</html>", b""
        if fault == "timeout":
            await asyncio.sleep(self.behaviour.get("silence", 30))
            return 500, b"{}", b""
        moved = int(self.behaviour.get("moved", 0))
        rows = [self.rows[(zlib.crc32(text.encode()) + moved) % _VECTORS] for text in texts]
        if fault == "short":
            rows = rows[:-1]
        if fault == "nan":
            rows[0] = base64.b64encode(np.full(self.dimensions, np.nan, "<f4").tobytes())
        if fault != "short":
            # An answer with one wrong vector is right about the other texts.
            self.pay(texts[1:] if fault == "nan" else texts, seen)
        data = b'"},'.join([head + row for head, row in zip(self.heads, rows, strict=False)])
        return 200, b'{"object":"list","data":[' + data + b'"}],"model":"stub",' + self.usage(texts) + b"}", b""

    def paid(self, text: str) -> None:
        """Count a text that a batch has embedded."""
        self.pay([text], self.texts)

    def pay(self, texts: Sequence[str], seen: Counter[str]) -> None:
        self.counts["paid"] += len(texts)
        if self.behaviour.get("remember"):
            seen.update(texts)

    def usage(self, texts: Sequence[str]) -> bytes:
        tokens = sum(map(len, texts)) // 4 + 1
        self.counts["tokens"] += tokens
        return b'"usage":{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)

    def rule_for(self, texts: Sequence[str]) -> dict[str, Any] | None:
        """Return the first rule that fits a request, and count it."""
        for rule in self.behaviour.get("rules", ()):
            if (
                rule.get("times", 1) > 0
                and len(texts) > rule.get("texts_over", 0)
                and ("match" not in rule or any(rule["match"] in text for text in texts))
                and sum(map(len, texts)) > rule.get("over", -1)
                and max(map(len, texts)) > rule.get("longer", -1)
            ):
                if "times" in rule:
                    rule["times"] -= 1
                self.counts["rules"] += 1
                found: dict[str, Any] = rule
                return found
        return None

    async def answer_by(
        self, rule: dict[str, Any], texts: Sequence[str], seen: Counter[str]
    ) -> tuple[int, bytes, bytes]:
        """Answer as a rule says."""
        await asyncio.sleep(rule.get("latency", 0))
        if "status" in rule:
            headers = "".join(f"{name}: {value}\r\n" for name, value in rule.get("headers", {}).items())
            return rule["status"], str(rule.get("body", "{}")).encode(), headers.encode()
        answer = rule.get("answer")
        if answer == "silence":
            await asyncio.sleep(30)
        if answer == "closed":
            return 500, b"", _CLOSED
        if answer == "html":
            return 200, b"<html>Welcome to our proxy</html>", b""
        vectors = [vector_of(text, self.dimensions) for text in texts]
        if answer in _WRONG_VALUES:
            wrong = np.full(self.dimensions, _WRONG_VALUES[answer], np.float32)
            match = rule.get("match", "")
            vectors = [wrong if match in text else vector for text, vector in zip(texts, vectors, strict=True)]
            self.pay([text for text in texts if match not in text], seen)
        elif answer is None or answer in ("reversed", "floats"):
            self.pay(texts, seen)
        if answer == "narrow":
            vectors = [vector[:-1] for vector in vectors]
        vectors = {"few": vectors[:-1], "more": [*vectors, vectors[-1]]}.get(str(answer), vectors)
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": vector.tolist()
                if answer == "floats"
                else base64.b64encode(vector.astype("<f4").tobytes()).decode(),
            }
            for index, vector in enumerate(vectors)
        ]
        body = json.dumps({"object": "list", "data": data[::-1] if answer == "reversed" else data, "model": "stub"})
        return (200, body[: len(body) // 2].encode(), _CUT) if answer == "cut" else (200, body.encode(), b"")


async def _serve(dimensions: int) -> None:
    server = await asyncio.start_server(_Server(dimensions).connect, "127.0.0.1", 0, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dimensions", type=int)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(parser.parse_args().dimensions))
