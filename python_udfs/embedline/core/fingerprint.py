"""Hash everything that decides the meaning of a stored vector."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence


def recipe_fingerprint(recipe: Mapping[str, object]) -> str:
    """Return the SHA-256 (hex) of the recipe's canonical JSON.

    Equal recipes give equal fingerprints, in any order of their keys.
    """
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def recipe_stamp(fingerprints: Sequence[str]) -> int:
    """Return the stamp of documents chunked as these fingerprints ask for.

    It is an integer of PostgreSQL.
    """
    text = fingerprints[0] if len(fingerprints) == 1 else recipe_fingerprint({"fingerprints": list(fingerprints)})
    return int.from_bytes(bytes.fromhex(text[:8]), "big", signed=True)
