"""Embed texts and images over HTTP, in vLLM's, Cohere's or Voyage's form.

Each image is a request of its own: vLLM and Cohere take one at a time, and a file that is refused then fails alone. The
file goes as it is stored, as a data URL; nothing here decodes it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from embedline.core.embedding import EmbeddingBlock, Kind, ModelConfig, ModelInfo
from embedline.core.media import MediaPart, ModelInput, only_texts
from embedline.core.redaction import redact
from embedline.errors import DimensionMismatch, InputRejected, ProviderError, ProviderMisconfigured
from embedline.providers.endpoint import Endpoint
from embedline.providers.guard import MOST_BYTES
from embedline.providers.openai_answer import read_answer
from embedline.providers.options import given_bodies, request_body

# First bytes of the files that all three forms take.
_KINDS = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
# Most bytes of an answer: for each vector, and for all.
_BYTES_OF_VECTOR, _BYTES_BESIDE = 1 << 20, 1 << 20
# Answers that are kept for the next try of a request that failed: several requests of an eighth of this number of images.
_MOST_KEPT = 1024
Body = dict[str, Any]


@dataclass(frozen=True)
class _Form:
    """How a provider is asked: the path and body for texts, and for one image.

    `data` turns an answer into that of OpenAI's form. Without a `url` the model needs a base_url.
    """

    text_path: str
    image_path: str
    texts: Callable[[Sequence[str], Kind], Body]
    image: Callable[[str, Kind], Body]
    data: Callable[[Any], Any] = lambda answer: answer
    url: str | None = None
    key: str | None = None


def _of_cohere(answer: Any) -> Any:
    """Return an answer of Cohere's in OpenAI's form."""
    found = answer["embeddings"]["float"]
    billed = answer.get("meta", {}).get("billed_units", {})
    counts = [billed.get(unit) for unit in ("input_tokens", "image_tokens")]
    tokens = sum(int(n) for n in counts if type(n) is int or (type(n) is float and math.isfinite(n)))
    usage = {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}} if tokens else {}
    return {"data": [{"index": place, "embedding": vector} for place, vector in enumerate(found)], **usage}


_FORMS: Mapping[str, _Form] = {
    "vllm": _Form(
        "/embeddings",
        "/embeddings",
        lambda texts, _: {"input": list(texts), "encoding_format": "float"},
        lambda url, _: {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}],
            "encoding_format": "float",
        },
    ),
    "cohere": _Form(
        "/embed",
        "/embed",
        lambda texts, kind: {
            "texts": list(texts),
            "input_type": "search_query" if kind == "query" else "search_document",
            "embedding_types": ["float"],
        },
        lambda url, _: {"images": [url], "input_type": "image", "embedding_types": ["float"]},
        _of_cohere,
        "https://api.cohere.com/v2",
        "CO_API_KEY",
    ),
    "voyage": _Form(
        "/multimodalembeddings",
        "/multimodalembeddings",
        lambda texts, kind: {
            "inputs": [{"content": [{"type": "text", "text": text}]} for text in texts],
            "input_type": kind,
        },
        lambda url, kind: {
            "inputs": [{"content": [{"type": "image_base64", "image_base64": url}]}],
            "input_type": kind,
        },
        url="https://api.voyageai.com/v1",
        key="VOYAGE_API_KEY",
    ),
}
IMAGE_FORMS = tuple(_FORMS)


class ImageEndpoint(Endpoint):
    """Embed texts and images through an endpoint of one of these forms."""

    def __init__(self, config: ModelConfig) -> None:
        self._form = _FORMS[str(config.options["image_form"])]
        if config.base_url is None and self._form.url is None:
            raise ProviderMisconfigured(
                f'model "{config.name}" needs a base_url', hint="For example base_url => 'http://127.0.0.1:8000/v1'."
            )
        super().__init__(config, self._form.url, self._form.key)
        # Answers to the images of requests that failed because of another image, by what was asked.
        self._kept: dict[bytes, EmbeddingBlock | str] = {}

    def submit(self, texts: Sequence[ModelInput], kind: Kind) -> Future[EmbeddingBlock]:
        """Start embedding texts, or images; the future raises ProviderError."""
        parts = [given for given in texts if isinstance(given, MediaPart)]
        embedding = (
            self._images(parts, kind)
            if parts and len(parts) == len(texts)
            else self._texts(only_texts(texts), kind, time.monotonic())
        )
        return self._thread.start(embedding)

    def probe(self) -> Future[ModelInfo]:
        """Embed one short text to learn the dimensions."""
        return self._thread.start(self._probe())

    # The loop's thread

    async def _probe(self) -> ModelInfo:
        block = await self._texts(["probe"], "document", time.monotonic())
        identity: list[object] = [self._config.options["image_form"], self._address, self._config.model]
        identity += [block.dimensions, given_bodies(self._config.options)]
        return ModelInfo(
            dimensions=block.dimensions,
            max_tokens=self._config.options.get("max_tokens"),
            tokenizer_path=self._config.options.get("tokenizer"),
            fingerprint=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
            modalities=("text", "image"),
        )

    async def _texts(self, texts: Sequence[str], kind: Kind, submitted_at: float) -> EmbeddingBlock:
        prefix = self._config.query_prefix if kind == "query" else self._config.document_prefix
        body = self._form.texts([prefix + text for text in texts], kind)
        return await self._in_turn(
            submitted_at, lambda key: self._ask(self._form.text_path, body, kind, len(texts), key)
        )

    async def _images(self, parts: Sequence[MediaPart], kind: Kind) -> EmbeddingBlock:
        """Embed each image by itself; one that is refused has no vector, and the reason.

        If one fails for now, no more are sent, and the answers that come are kept: they are paid for.
        """
        failures: list[ProviderError] = []
        names = [hashlib.sha256(kind.encode() + part.data).digest() for part in parts]
        found = await asyncio.gather(*(self._image(*given, kind, failures) for given in zip(names, parts, strict=True)))
        answers = [answer for answer in found if answer is not None]
        if failures:
            self._kept |= {name: answer for name, answer in zip(names, found, strict=True) if answer is not None}
            for name in list(self._kept)[:-_MOST_KEPT]:
                del self._kept[name]
            raise failures[0]
        blocks = [answer for answer in answers if isinstance(answer, EmbeddingBlock)]
        faults = {place: answer for place, answer in enumerate(answers) if isinstance(answer, str)}
        dimensions = blocks[0].dimensions if blocks else self._config.dimensions or 1
        if any(block.dimensions != dimensions for block in blocks):
            raise DimensionMismatch("the provider returned vectors of different dimensions")
        missing = b"\0\0\xc0\x7f" * dimensions
        data = b"".join(missing if isinstance(answer, str) else answer.data for answer in answers)
        counted = [block.tokens for block in blocks]
        tokens = None if None in counted else sum(count or 0 for count in counted)
        return EmbeddingBlock(len(parts), dimensions, data, tokens, faults=faults)

    async def _image(
        self, name: bytes, part: MediaPart, kind: Kind, failures: list[ProviderError]
    ) -> EmbeddingBlock | str | None:
        """Return the answer to an image, or why it is refused.

        If it fails for now, add the error to the failures and return None.
        """
        if (kept := self._kept.pop(name, None)) is not None:
            return kept
        media_type = next((name for first, name in _KINDS.items() if part.data.startswith(first)), None)
        if part.data[:4] == b"RIFF" and part.data[8:12] == b"WEBP":
            media_type = "image/webp"
        if part.modality != "image" or media_type is None:
            return "the file is no JPEG, PNG, WebP or GIF, which the provider takes"
        url = f"data:{media_type};base64,{base64.b64encode(part.data).decode()}"
        body = self._form.image(url, kind)

        async def ask(key: str | None) -> EmbeddingBlock:
            if failures:
                raise failures[0]
            return await self._ask(self._form.image_path, body, kind, 1, key)

        try:
            return await self._in_turn(time.monotonic(), ask)
        except InputRejected as error:
            return f"{error.message}: {error.detail}" if error.detail else error.message
        except ProviderError as error:
            failures.append(error)
            return None

    async def _ask(self, path: str, body: Body, kind: Kind, count: int, key: str | None) -> EmbeddingBlock:
        MOST_BYTES.set(_BYTES_BESIDE + count * _BYTES_OF_VECTOR)
        options: Any = {"headers": self._headers(key)}
        given = {**request_body(self._config.options, kind), **body, "model": self._config.model}
        answer = self._open_client().post(path, cast_to=bytes, body=given, options=options)
        content = await self._answered(key, answer)

        def clean(text: str) -> str:
            return redact(text, key)

        # An answer of no known form goes on as it is: the reader says what came instead.
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            content = json.dumps(self._form.data(json.loads(content))).encode()
        return read_answer(content, count, self._config.dimensions, clean)
