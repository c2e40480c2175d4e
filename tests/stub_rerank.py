"""Answer as rerank endpoints do, in the forms of TEI, Cohere, Jina and vLLM.

For tests/stub_provider.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

# What an answer may be instead of right. Each takes and returns the list of results.
_WRONG: dict[str, Callable[[list[dict[str, Any]]], list[Any]]] = {
    "few": lambda results: results[:-1],
    "more": lambda results: [*results, results[-1]],
    "twice": lambda results: [*results[:-1], results[0]],
    "range": lambda results: [{**results[0], "index": len(results)}, *results[1:]],
    "negative": lambda results: [{**results[0], "index": -1}, *results[1:]],
    "unindexed": lambda results: [{name: value for name, value in item.items() if name != "index"} for item in results],
    "nan": lambda results: [_scored(results[0], float("nan")), *results[1:]],
    "huge": lambda results: [_scored(results[0], 1e300), *results[1:]],
    "words": lambda results: [_scored(results[0], "high"), *results[1:]],
    "numbers": lambda results: [1.0 for _ in results],
}


def score_of(query: str, text: str) -> float:
    """Return the score that the stub answers.

    It is the share of the query's words that the text has.
    """
    words = query.lower().split()
    return sum(word.strip("?.,") in text.lower() for word in words) / len(words)


def texts_of(given: dict[str, Any]) -> list[str]:
    """Return the texts of a request in any form."""
    found: list[str] = given.get("texts") or given.get("documents") or []
    return found


def rerank_answer(path: str, given: dict[str, Any], answer: str | None) -> tuple[int, bytes]:
    """Return status and body for a request, best results first.

    A body with `texts` is TEI's; the path /v2 is Cohere's; any other is Jina's and vLLM's.
    """
    texts, query = texts_of(given), given["query"]
    is_tei = "texts" in given
    if is_tei == ("model" in given) or (not is_tei and given["top_n"] != len(texts)):
        return 422, b'{"error": "the request has not the form of this endpoint"}'
    name = "score" if is_tei else "relevance_score"
    results = [{"index": index, name: score_of(query, text)} for index, text in enumerate(texts)]
    results.sort(key=lambda item: -item[name])
    shown = _WRONG[answer](results) if answer else results
    if is_tei:
        return 200, json.dumps(shown).encode()
    charged: dict[str, Any] = {"usage": {"total_tokens": tokens_of(query, texts)}}
    if path.startswith("/v2/"):
        charged = {"meta": {"billed_units": {"search_units": 1}}}
    return 200, json.dumps({"results": shown, **charged}).encode()


def tokens_of(query: str, texts: Sequence[str]) -> int:
    """Return the tokens that the stub charges: a word is one."""
    return sum(len(query.split()) + len(text.split()) for text in texts)


def _scored(item: dict[str, Any], score: object) -> dict[str, Any]:
    return {name: value if name == "index" else score for name, value in item.items()}
