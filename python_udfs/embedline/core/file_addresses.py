"""Decide which files may be fetched for rows that hold addresses."""

from __future__ import annotations

import json
from collections.abc import Iterable
from urllib.parse import SplitResult, unquote, urlsplit

from embedline.errors import InputRejected

SCHEMES = ("file", "http", "https", "s3")


# What stands around the expressions of a content that is an address: address, address again, what changes with its file.
_HEAD = "CASE WHEN (\n"
_ADDRESS_AGAIN = "\n) IS NOT NULL THEN pg_catalog.jsonb_build_array((\n"
_CHANGED_BY = "\n)::pg_catalog.text, (\n"
_TAIL = "\n)::pg_catalog.text)::pg_catalog.text END"


def content_expression(address: str, changed_by: str) -> str:
    """Return the expression of a content that is an address.

    Beside it stands what changes when the file does. Both are expressions over a row; without an address there is no
    content.
    """
    return f"{_HEAD}{address}{_ADDRESS_AGAIN}{address}{_CHANGED_BY}{changed_by}{_TAIL}"


def content_parts(expression: str) -> tuple[str, str]:
    """Return the address and what changes with its file.

    They are those that `content_expression` was given. Raises ValueError for any other expression.
    """
    inner = expression.removeprefix(_HEAD).removesuffix(_TAIL)
    end = inner.find(_ADDRESS_AGAIN)
    while end >= 0:
        address = inner[:end]
        # An address may hold such a text itself.
        before = f"{address}{_ADDRESS_AGAIN}{address}{_CHANGED_BY}"
        if inner.startswith(before) and content_expression(address, inner[len(before) :]) == expression:
            return address, inner[len(before) :]
        end = inner.find(_ADDRESS_AGAIN, end + 1)
    raise ValueError("the expression is that of no address")


def address_of(content: str) -> str:
    """Return the address in a content of `content_expression`."""
    return str(json.loads(content)[0])


def listed_prefix(address: str, prefixes: Iterable[str]) -> str:
    """Return the entry of the list under which an address stands.

    An entry ends with a slash. Raises InputRejected for an address under none, and for one that could lead out of it.
    """
    parts = _split(address)
    plain = f"{parts.scheme}://{parts.netloc.lower()}{parts.path}"
    for prefix in prefixes:
        if prefix.endswith("/") and plain.startswith(prefix):
            return prefix
    raise InputRejected(
        f"{shown(address)} is under no entry of embedline.media_source",
        hint="As a superuser: INSERT INTO embedline.media_source (prefix) VALUES ('https://files.example.com/photos/');",
    )


def shown(address: str) -> str:
    """Return an address without its query, which may hold a signature."""
    return address.partition("?")[0].partition("#")[0][:200]


def _split(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        is_known = parts.scheme in SCHEMES and (parts.scheme == "file") != bool(parts.netloc)
        is_known = is_known and (parts.port is None or parts.port > 0)
    except ValueError:
        is_known = False
    if not is_known:
        raise InputRejected(f"the address is none of {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    path = unquote(unquote(parts.path))
    if "@" in parts.netloc or parts.fragment or not address.isprintable() or "\\" in path:
        raise InputRejected("the address holds a user, a fragment or characters that no address has")
    if any(segment in (".", "..") for segment in path.split("/")) or "\0" in path:
        raise InputRejected("the address holds a step to another folder")
    return parts
