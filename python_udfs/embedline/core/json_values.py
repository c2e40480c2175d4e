"""Read jsonb values, which PL/Python hands over as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a jsonb object as a mapping; any other value as an empty one."""
    loaded = json.loads(value) if isinstance(value, str) else value
    return loaded if isinstance(loaded, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return a jsonb array as a list; any other value as an empty one."""
    loaded = json.loads(value) if isinstance(value, str) else value
    return loaded if isinstance(loaded, list) else []
