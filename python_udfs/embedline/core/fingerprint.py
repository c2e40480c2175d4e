"""Hash everything that decides the meaning of a stored vector."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def recipe_fingerprint(recipe: Mapping[str, object]) -> str:
    """Return the SHA-256 (hex) of the recipe's canonical JSON.

    Equal recipes give equal fingerprints, in any order of their keys.
    """
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()
