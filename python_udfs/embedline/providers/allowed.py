"""Refuse addresses at which a model may not be asked."""

from __future__ import annotations

from urllib.parse import urlsplit

from embedline.core.embedding import ModelConfig
from embedline.core.endpoints import allowing_statement, is_allowed, is_forbidden_address
from embedline.errors import ProviderMisconfigured


def require_allowed(config: ModelConfig, url: str) -> None:
    """Raise ProviderMisconfigured unless the model may be asked at the address."""
    try:
        parts = urlsplit(url)
        place = f"{parts.hostname}{f':{parts.port}' if parts.port else ''}"
        allowed = is_allowed(url, config.allowed_endpoints)
    except ValueError:
        raise ProviderMisconfigured(f'the base URL of model "{config.name}" is not an http or https address') from None
    # A proxy of the environment resolves names itself, so an address in numbers is refused here, too.
    if is_forbidden_address(parts.hostname or ""):
        raise forbidden(place, parts.hostname or "")
    if not allowed:
        error = ProviderMisconfigured(
            f'model "{config.name}" may not be asked at {place}',
            detail="The address is not in embedline.allowed_endpoint, which only a superuser edits.",
            hint=f"As a superuser: {allowing_statement(url)}",
        )
        error.is_refusal = True
        raise error


def forbidden(address: str, peer: str) -> ProviderMisconfigured:
    """Return the error for an address that is never asked, whatever the list says."""
    error = ProviderMisconfigured(
        f"{address} is not asked, because it is at {peer}",
        detail="Link-local addresses, and those of a cloud's metadata, give out credentials of the machine.",
        hint="Register the model with the address of a service that embeds.",
    )
    error.is_refusal = True
    return error
