"""Check a model's options and build the request bodies from them.

Options are checked when a model is registered or altered, not when it is used, so that a registered model goes on
working.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from embedline.errors import InvalidParameter

# Options that add to the body of each request, of documents, and of queries.
BODY_OPTIONS = ("extra_body", "document_body", "query_body")
# Members of a body that have a parameter or an option of their own, with the way to set them.
_RESERVED_MEMBERS = {
    "input": "The texts come from the pipeline; a prefix is document_prefix or query_prefix.",
    "model": "It is the parameter model => '…'.",
    "dimensions": 'It is the parameter dimensions => N, with the option "send_dimensions": true.',
    "encoding_format": 'It is the option "encoding_format".',
}
# Names of members that look like secrets. Every role that may search could read a key in an option.
_SECRET_MEMBER = re.compile(
    r"(api|access|auth|secret)[-_ ]?(key|token)|authorization|passw|secret|credential|\Atoken\Z", re.I
)
# Parameters of create_model that are mistaken for options.
_PARAMETERS = (
    "dimensions", "base_url", "api_key_env", "revision", "document_prefix", "query_prefix", "max_batch_items",
    "max_batch_tokens", "concurrency", "timeout_seconds", "price_per_million_tokens",
)  # fmt: skip
# Least similarity at which a known name is proposed for an unknown one (difflib's own default).
_SIMILARITY = 0.6
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z")


@dataclass(frozen=True)
class Option:
    """An option: its test, the values that it takes in words, and a hint."""

    fits: Callable[[Any], bool]
    wanted: str
    hint: str


def _body(example: str) -> Option:
    return Option(lambda value: isinstance(value, dict), "an object", f"For example options => '{example}'.")


OPENAI_OPTIONS = {
    "max_tokens": Option(
        lambda value: type(value) is int and value > 0, "a positive whole number", "The longest text in tokens."
    ),
    "tokenizer": Option(
        lambda value: isinstance(value, str) and bool(value), "a path", "The model's tokenizer.json on the server."
    ),
    "send_dimensions": Option(
        lambda value: type(value) is bool, "true or false", "By default only text-embedding-3-* gets dimensions."
    ),
    "key_header": Option(
        lambda value: isinstance(value, str) and _HEADER_NAME.match(value) is not None,
        "the name of a header",
        'For example options => \'{"key_header": "api-key"}\'.',
    ),
    "encoding_format": Option(
        lambda value: value in ("base64", "float", "none"),
        '"base64", "float" or "none"',
        "Leave it out: the probe finds which one the endpoint takes.",
    ),
    "ca_file": Option(
        lambda value: isinstance(value, str) and os.path.isabs(value),
        "the absolute path of a file on the server",
        'For example options => \'{"ca_file": "/etc/ssl/private-ca.pem"}\'.',
    ),
    "image_form": Option(
        lambda value: value in ("vllm", "cohere", "voyage"),
        '"vllm", "cohere" or "voyage"',
        "The form in which the endpoint takes images beside texts.",
    ),
    "batch_api": Option(
        lambda value: type(value) is bool,
        "true or false",
        "true: backfills go through the provider's batch endpoint, which answers within a day at half the price.",
    ),
    "extra_body": _body('{"extra_body": {"truncate": "END"}}'),
    "document_body": _body('{"document_body": {"input_type": "passage"}}'),
    "query_body": _body('{"query_body": {"input_type": "query"}}'),
}

RERANK_OPTIONS = {name: OPENAI_OPTIONS[name] for name in ("max_tokens", "key_header", "ca_file")} | {
    "extra_body": _body('{"extra_body": {"raw_scores": true}}'),
}


def check_options(model: str, given: Mapping[str, Any], known: Mapping[str, Option] | Collection[str]) -> None:
    """Raise InvalidParameter for an unknown option or a value that does not fit.

    Values are checked only if `known` maps names to options. NULL stands for an option that is not given.
    """
    for name, value in given.items():
        if name not in known:
            raise unknown_option(model, name, known)
        if isinstance(known, Mapping) and value is not None and not known[name].fits(value):
            raise InvalidParameter(
                f'option "{name}" of model "{model}" must be {known[name].wanted}', hint=known[name].hint
            )
    for name in BODY_OPTIONS:
        if name in known and given.get(name):
            _check_body(model, name, given[name])


def unknown_option(model: str, name: str, known: Collection[str]) -> InvalidParameter:
    """Return the error for an option that the model's provider does not know.

    Its hint proposes the nearest known name.
    """
    from difflib import get_close_matches

    by_lower = {option.lower(): option for option in (*_PARAMETERS, *known)}
    nearest = get_close_matches(name.lower(), by_lower, 1, _SIMILARITY)
    proposed = by_lower[nearest[0]] if nearest else None
    if proposed is None:
        hint = ""
    elif proposed in known:
        hint = f'Did you mean "{proposed}"? '
    else:
        hint = f"Did you mean the parameter {proposed} => …, which is no option? "
    options = f"The options are {', '.join(known)}." if known else "This provider has no options."
    return InvalidParameter(f'model "{model}" has an unknown option "{name}"', hint=f"{hint}{options}")


def request_body(options: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the options' additions to a request for documents or for queries.

    The members of the kind's own body win over those of extra_body.
    """
    return {**(options.get("extra_body") or {}), **(options.get(f"{kind}_body") or {})}


def given_bodies(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given bodies, which decide the vectors.

    A model without any has an empty result.
    """
    return {name: options[name] for name in BODY_OPTIONS if options.get(name)}


def _check_body(model: str, option: str, body: Mapping[str, Any]) -> None:
    for member in body:
        if (hint := _RESERVED_MEMBERS.get(member.strip().lower())) is not None:
            raise InvalidParameter(f'option "{option}" of model "{model}" must not set "{member}"', hint=hint)
    for member in _members(body):
        if _SECRET_MEMBER.search(member):
            raise InvalidParameter(
                f'option "{option}" of model "{model}" must not hold a secret, such as "{member}"',
                detail="Its value is not shown here, but every role that may search can read it in embedline.model.",
                hint="Start the server with the key in a variable and pass api_key_env => 'ITS_NAME'.",
            )


def _members(value: object) -> Iterator[str]:
    """Yield the names of all members, at any depth."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _members(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _members(inner)
