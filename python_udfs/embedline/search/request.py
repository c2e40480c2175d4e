"""A search as a caller asks for it, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from embedline.core.expression import require_single_expression
from embedline.errors import InvalidParameter
from embedline.postgres.entry import require_given

MODES = ("vector", "keyword", "hybrid")
_MAX_K = 10_000
# Chunks that each arm of a hybrid search ranks at least, and their number for each chunk wanted.
_LEAST_WINDOW, _WINDOW_FACTOR = 50, 4
# Chunks that a reranker reads, if the caller sets no window: each takes 50 to 100 ms of a core.
_RERANKED = 20


@dataclass(frozen=True)
class SearchRequest:
    """The parameters of search; see sql/functions/search.sql."""

    query: str | bytes | None
    k: int
    per_document: bool
    ef_search: int | None
    mode: str | None
    semantic_weight: float
    keyword_weight: float
    rrf_k: int
    window_size: int | None
    reranker: str | None
    filter: str | None
    explain: bool
    filter_search_path: str

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any]) -> Self:
        """Return the request of an SQL function's parameters; raise InvalidParameter."""
        required = ("k", "semantic_weight", "keyword_weight", "rrf_k")
        require_given(**{name: given[name] for name in required})
        request = cls(**{parameter.name: given[parameter.name] for parameter in fields(cls)})
        request._check()
        if isinstance(request.query, bytes):
            request = replace(request, mode="vector")
        per_document, explain = bool(request.per_document), bool(request.explain)
        return replace(request, per_document=per_document, explain=explain)

    @classmethod
    def of_media(cls, given: Mapping[str, Any]) -> Self:
        """Return the request of a search with a file; raise InvalidParameter."""
        words = {"semantic_weight": 1.0, "keyword_weight": 1.0, "rrf_k": 60, "window_size": None, "reranker": None}
        return cls.from_parameters({**words, **given})

    @classmethod
    def of_documents(cls, query: str, k: int) -> Self:
        """Return the request for the k best documents, with the defaults of search."""
        return cls(query, k, True, None, None, 1.0, 1.0, 60, None, None, None, False, "")

    def _check(self) -> None:
        if not 1 <= self.k <= _MAX_K:
            raise InvalidParameter(f"k must be between 1 and {_MAX_K}, not {self.k}")
        if self.ef_search is not None and not 1 <= self.ef_search <= 1000:
            raise InvalidParameter("ef_search must be between 1 and 1000")
        if self.mode is not None and self.mode not in MODES:
            raise InvalidParameter(f'mode "{self.mode}" is not known', hint=f"Use one of {', '.join(MODES)}.")
        for name in ("semantic_weight", "keyword_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidParameter(f"{name} cannot be {getattr(self, name):g}", hint="Use 0 or more.")
        if self.semantic_weight == self.keyword_weight == 0:
            raise InvalidParameter("semantic_weight and keyword_weight cannot both be 0")
        if not 1 <= self.rrf_k <= _MAX_K:
            raise InvalidParameter(f"rrf_k must be between 1 and {_MAX_K}, not {self.rrf_k}")
        if self.window_size is not None and not self.k <= self.window_size <= _MAX_K:
            raise InvalidParameter(f"window_size must be between k and {_MAX_K}, not {self.window_size}")
        if isinstance(self.query, bytes) and (self.mode not in (None, "vector") or self.reranker is not None):
            raise InvalidParameter(
                "an image or a recording has no words to search by", hint="Leave mode and reranker out."
            )
        if self.filter is not None:
            require_single_expression(self.filter, "filter")

    @property
    def words(self) -> str:
        """Return the words of the query; an image or a recording has none."""
        return self.query if isinstance(self.query, str) else ""

    @property
    def is_plain(self) -> bool:
        """Return True if the vectors alone decide."""
        return self.reranker is None and self.filter is None and not self.explain

    @property
    def reranked(self) -> int:
        """Return the number of chunks that a reranker reads."""
        return self.window_size or max(_RERANKED, self.k)

    @property
    def window(self) -> int:
        """Return the number of chunks that each arm of a hybrid search ranks."""
        return self.window_size or max(_LEAST_WINDOW, _WINDOW_FACTOR * self.k)
