"""Recipes of models, pipelines and versions, as a caller gives them.

An SQL function hands its parameters over as one dictionary. Each class has a `from_parameters` that reads this dictionary.
Nothing is checked here: the entry points check a spec against the database and the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from typing import Any, Self

from embedline.core.json_values import as_mapping


@dataclass(frozen=True)
class Expressions:
    """SQL expressions over a row of the source; None if there is none.

    They are as the user wrote them.
    """

    content: str | None = None
    filter: str | None = None
    document_prefix: str | None = None
    tenant: str | None = None

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any]) -> Self:
        """Return the expressions among the parameters of an SQL function."""
        return cls(**{name: given[name] for name in EXPRESSIONS})

    def texts(self) -> dict[str, str]:
        """Return the text of each expression that there is, by parameter."""
        return {name: text for name in EXPRESSIONS if (text := getattr(self, name)) is not None}

    def only(self, parameters: list[str]) -> Expressions:
        """Return these expressions alone."""
        return Expressions(**{name: text for name, text in self.texts().items() if name in parameters})

    def differing(self, other: Expressions) -> list[str]:
        """Return the parameters whose expressions are not the same in both."""
        return [name for name in EXPRESSIONS if getattr(self, name) != getattr(other, name)]


# Parameters that are SQL expressions over a row of the source.
EXPRESSIONS = tuple(field.name for field in fields(Expressions))


@dataclass(frozen=True)
class ChunkingChoice:
    """Parameters of chunking; None leaves one to the pipeline or to the default."""

    method: str | None = None
    tokens: int | None = None
    overlap: int | None = None
    options: Mapping[str, Any] | None = None

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any]) -> Self:
        """Return the chunking among the parameters of an SQL function."""
        return cls(
            given["chunking"], given["chunk_tokens"], given["chunk_overlap"], _object_or_none(given["chunking_options"])
        )

    @property
    def is_given(self) -> bool:
        """Whether any of the parameters is given."""
        return self != ChunkingChoice()


# Index methods as messages name them.
METHOD_NAMES = {"hnsw": "HNSW", "ivfflat": "IVFFlat"}


@dataclass(frozen=True)
class IndexSpec:
    """The index of a version's vectors.

    `method` is "hnsw", "ivfflat" or "none"; `options` are pgvector's.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VersionSpec:
    """The column of a version's vectors and its index."""

    column_type: str
    distance: str
    index: IndexSpec


@dataclass(frozen=True)
class BackfillSpec:
    """Order and rate of a version's fill.

    `rate` are chunks a second at most; None sets no limit.
    """

    order: str
    rate: int | None = None


@dataclass(frozen=True)
class PipelineSpec:
    """A pipeline as create_pipeline is asked for it."""

    name: str
    source: str | None
    model: str
    expressions: Expressions
    search_path: str
    chunking: ChunkingChoice
    version: VersionSpec
    capture: str
    weight: float | None
    keyword: str | None
    modality: str = "text"
    is_reference: bool = False

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any]) -> Self:
        """Return the spec of create_pipeline's parameters."""
        index = IndexSpec(given["index_method"], as_mapping(given["index_options"]))
        return cls(
            name=given["name"],
            source=given["source"],
            model=given["model"],
            expressions=Expressions.from_parameters(given),
            search_path=given["expression_search_path"],
            chunking=ChunkingChoice.from_parameters(given),
            version=VersionSpec(given["column_type"], given["distance"], index),
            capture=given["capture"],
            weight=given["weight"],
            keyword=given["keyword"],
            modality=given["modality"],
            is_reference=given["changed_by"] is not None,
        )


@dataclass(frozen=True)
class PipelineChanges:
    """Changes of a pipeline as alter_pipeline is asked for them; None keeps."""

    expressions: Expressions
    search_path: str
    chunking: ChunkingChoice
    weight: float | None
    keyword: str | None
    dropped: frozenset[str]

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any]) -> Self:
        """Return the changes of alter_pipeline's parameters."""
        return cls(
            expressions=Expressions.from_parameters(given),
            search_path=given["expression_search_path"],
            chunking=ChunkingChoice.from_parameters(given),
            weight=given["weight"],
            keyword=given["keyword"],
            dropped=frozenset(given["drop"] or ()),
        )


@dataclass(frozen=True)
class VersionChoice:
    """A version as add_embedding_version is asked for it.

    None takes the serving version's value.
    """

    model: str
    column_type: str | None
    distance: str | None
    index_method: str | None
    index_options: Mapping[str, Any] | None
    chunking: ChunkingChoice
    backfill: BackfillSpec

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any]) -> Self:
        """Return the choice of add_embedding_version's parameters."""
        return cls(
            model=given["model"],
            column_type=given["column_type"],
            distance=given["distance"],
            index_method=given["index_method"],
            index_options=_object_or_none(given["index_options"]),
            chunking=ChunkingChoice.from_parameters(given),
            backfill=BackfillSpec(given["backfill_order"], given["backfill_rate"]),
        )

    def over(self, serving: VersionSpec) -> VersionSpec:
        """Return the complete spec, with the serving version's values for those not given."""
        method = serving.index.method if self.index_method is None else self.index_method
        # Options belong to a method.
        inherited = serving.index.options if method == serving.index.method else {}
        index = IndexSpec(method, inherited if self.index_options is None else self.index_options)
        return replace(
            serving,
            column_type=serving.column_type if self.column_type is None else self.column_type,
            distance=serving.distance if self.distance is None else self.distance,
            index=index,
        )


@dataclass(frozen=True)
class RequestLimits:
    """Limits of the requests to a model; None, when a model is altered, keeps one."""

    max_batch_items: int | None = None
    max_batch_tokens: int | None = None
    concurrency: int | None = None
    timeout_seconds: float | None = None

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any]) -> Self:
        """Return the limits among the parameters of an SQL function."""
        return cls(**{limit.name: given[limit.name] for limit in fields(cls)})

    def given(self) -> dict[str, float]:
        """Return the limits that are given, by parameter."""
        return {limit.name: value for limit in fields(self) if (value := getattr(self, limit.name)) is not None}


@dataclass(frozen=True)
class ModelSpec:
    """A model as create_model is asked for it; `options` is the text of a jsonb value."""

    name: str
    provider: str
    model: str
    task: str
    dimensions: int | None
    revision: str | None
    base_url: str | None
    api_key_env: str | None
    document_prefix: str
    query_prefix: str
    limits: RequestLimits
    options: str | None
    price: Decimal | None

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any]) -> Self:
        """Return the spec of create_model's parameters."""
        same = {spec.name: given[spec.name] for spec in fields(cls) if spec.name in given}
        return cls(**same, limits=RequestLimits.from_parameters(given), price=given["price_per_million_tokens"])


@dataclass(frozen=True)
class ModelChanges:
    """Changes of a model as alter_model is asked for them; None keeps.

    `options` is the text of a jsonb value.
    """

    model: str | None
    base_url: str | None
    api_key_env: str | None
    limits: RequestLimits
    options: str | None
    price: Decimal | None

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any]) -> Self:
        """Return the changes of alter_model's parameters."""
        same = {change.name: given[change.name] for change in fields(cls) if change.name in given}
        return cls(**same, limits=RequestLimits.from_parameters(given), price=given["price_per_million_tokens"])


def _object_or_none(value: Any) -> Mapping[str, Any] | None:
    return None if value is None else as_mapping(value)
