"""Find the class that embeds for a provider, in this package or in others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from embedline.core.embedding import TASKS, Embedder, ModelConfig
from embedline.errors import InvalidParameter
from embedline.providers.allowed import require_allowed

if TYPE_CHECKING:
    from embedline.core.reranking import Reranker
    from embedline.providers.options import Option

# The entry points by which other packages announce providers: name = provider, value = a callable from ModelConfig to
# Embedder.
ENTRY_POINT_GROUP = "embedline.embedders"
# Forms of rerank endpoints; see providers/rerank_forms.py, which is not imported here, because a search does not need it.
RERANK_PROVIDERS = ("tei", "cohere", "jina", "vllm")


def known_options(provider: str) -> Mapping[str, Option] | Collection[str] | None:
    """Return the options of a provider's models, None if the provider lists none.

    A class of another package lists them in its attribute `options`.
    """
    if provider == "sentence-transformers":
        # The host's settings are checked together, each time they are read.
        return None
    if provider == "openai":
        from embedline.providers.options import OPENAI_OPTIONS

        return OPENAI_OPTIONS
    if provider in RERANK_PROVIDERS:
        from embedline.providers.options import RERANK_OPTIONS

        return RERANK_OPTIONS
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINT_GROUP, name=provider):
        options: Mapping[str, Option] | Collection[str] | None = getattr(entry.load(), "options", None)
        return options
    return None


def create_embedder(config: ModelConfig) -> Embedder:
    """Return the embedder of the config's provider.

    Provider modules are heavy, so they are imported on first use.
    """
    if config.provider == "sentence-transformers":
        from embedline.embedders.local import LocalEmbedder

        return LocalEmbedder(config)
    if config.provider == "openai":
        if config.options.get("image_form"):
            from embedline.providers.image_endpoint import ImageEndpoint

            return ImageEndpoint(config)
        from embedline.providers.openai_compatible import OpenAIEmbedder

        return OpenAIEmbedder(config)
    # Imported here, because it takes 30 ms and the package's own providers do not need it.
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINT_GROUP, name=config.provider):
        if config.base_url is not None:
            # The package's own clients check it before each request.
            require_allowed(config, config.base_url)
        embedder: Embedder = entry.load()(config)
        return embedder
    raise InvalidParameter(
        f'unknown provider "{config.provider}"',
        hint="Use provider => 'sentence-transformers' or 'openai', or install a package with an entry point of that name in"
        f" the group {ENTRY_POINT_GROUP}.",
    )


def create_reranker(config: ModelConfig) -> Reranker:
    """Return the reranker of the config's provider.

    Provider modules are heavy, so they are imported on first use.
    """
    check_task(config.provider, config.task)
    if config.provider == "sentence-transformers":
        from embedline.embedders.local import LocalEmbedder

        return LocalEmbedder(config)
    from embedline.providers.rerank_endpoint import RerankEndpoint

    return RerankEndpoint(config)


def check_task(provider: str, task: str) -> None:
    """Raise InvalidParameter if the task is unknown, or the provider does other work."""
    if task not in TASKS:
        raise InvalidParameter(f'task "{task}" is not known', hint="Use task => 'embed' or task => 'rerank'.")
    if task == "embed" and provider in RERANK_PROVIDERS:
        raise InvalidParameter(
            f'provider "{provider}" reranks and makes no vectors',
            hint="Add task => 'rerank'; an endpoint that embeds has provider => 'openai'.",
        )
    if task == "rerank" and provider not in ("sentence-transformers", *RERANK_PROVIDERS):
        raise InvalidParameter(
            f'provider "{provider}" has no rerankers',
            hint="Use provider => 'sentence-transformers' for a local cross-encoder, or the form of the endpoint: "
            + ", ".join(f"'{name}'" for name in RERANK_PROVIDERS)
            + ".",
        )
