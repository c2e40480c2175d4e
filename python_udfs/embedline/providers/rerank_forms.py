"""Write requests to rerank endpoints, and read their answers.

TEI has a form of its own. Cohere, Jina and vLLM share one, and differ in the count that they charge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedline.core.reranking import RerankScores, pack_scores
from embedline.errors import InvalidScores, TransientProviderError
from embedline.providers.openai_errors import error_text

# Characters of an unreadable answer that its error shows.
_SHOWN_CHARACTERS = 4096


@dataclass(frozen=True)
class RerankForm:
    """The form of a provider's rerank endpoint.

    `url` is the address of the provider's own service, whose key is in the variable `key`. `texts`, `results` and `score`
    are members of request and answer; no `results` means that the answer is the list itself. `count` is the path to the
    charged number; `count_name` names its unit.
    """

    texts: str
    score: str
    results: str | None
    url: str | None = None
    key: str | None = None
    names_model: bool = True
    added: Mapping[str, Any] | None = None
    count: tuple[str, ...] = ("usage", "total_tokens")
    count_name: str = "tokens"

    def body(self, model: str, query: str, texts: Sequence[str], extra: Mapping[str, Any]) -> dict[str, Any]:
        """Return the request for all scores, with the option extra_body's members."""
        body = {**(self.added or {}), **extra, "query": query, self.texts: list(texts)}
        if self.names_model:
            body |= {"model": model, "top_n": len(texts)}
        return body


RERANK_FORMS: Mapping[str, RerankForm] = {
    "tei": RerankForm("texts", "score", None, names_model=False, added={"truncate": True}),
    "cohere": RerankForm(
        "documents", "relevance_score", "results", "https://api.cohere.com/v2", "CO_API_KEY",
        count=("meta", "billed_units", "search_units"), count_name="search units",
    ),
    "jina": RerankForm(
        "documents", "relevance_score", "results", "https://api.jina.ai/v1", "JINA_API_KEY",
        added={"return_documents": False},
    ),
    "vllm": RerankForm("documents", "relevance_score", "results"),
}  # fmt: skip


def read_scores(form: RerankForm, content: bytes, count: int, clean: Callable[[str], str]) -> RerankScores:
    """Check an answer's body and return its scores in the order of the texts.

    Raises TransientProviderError if the body is not an answer at all, and InvalidScores if it does not fit the texts.
    """
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        text = clean(content[:_SHOWN_CHARACTERS].decode(errors="replace"))
        raise TransientProviderError("the provider's answer is not JSON", detail=text) from None
    items = answer.get(form.results) if form.results and isinstance(answer, dict) else answer
    if not isinstance(items, list):
        text = clean(error_text(content[:_SHOWN_CHARACTERS].decode(errors="replace")))
        raise TransientProviderError("the provider's answer holds no scores", detail=text)
    if len(items) != count:
        raise InvalidScores(f"the provider returned {len(items)} scores for {count} texts")
    scores: dict[int, float] = {}
    for item in items:
        number, score = _entry(item, form.score)
        if not 0 <= number < count:
            raise InvalidScores(f"the provider returned a score with index {number} for {count} texts")
        if number in scores:
            raise InvalidScores(f"the provider returned two scores with index {number}")
        scores[number] = score
    packed = pack_scores([scores[number] for number in range(count)], _charged(answer, form.count))
    packed.values()
    return packed


def _entry(item: object, score_name: str) -> tuple[int, float]:
    """Return the index and the score of one result."""
    number = item.get("index") if isinstance(item, dict) else None
    if type(number) is not int:
        raise InvalidScores(
            "the provider returned a score without an index",
            detail="Results come best first, so their place does not say which text they are of.",
        )
    score = item.get(score_name) if isinstance(item, dict) else None
    # A bool is an int in Python.
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise InvalidScores(f'the provider returned a result without a number as its "{score_name}"')
    try:
        return number, float(score)
    except OverflowError:
        raise InvalidScores(detail="A score is beyond the range of float32.") from None


def _charged(answer: object, path: Sequence[str]) -> int | None:
    """Return the number that the provider charges, None if it names none."""
    for member in path:
        answer = answer.get(member) if isinstance(answer, dict) else None
    return int(answer) if isinstance(answer, int | float) and answer > 0 else None
