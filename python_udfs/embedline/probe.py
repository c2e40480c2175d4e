"""Whether a provider that failed a row again and again fails everybody: it is asked for a short text of our own.

Five failures in a row look the same whether a text brings its provider down or the provider is down. Before a row is given
up its model is asked for something harmless; only where that succeeds is the row the cause. Nobody waits for the answer: the
row is tried once more meanwhile.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from embedline.catalog import Model
from embedline.database import Session
from embedline.embedder_pool import embedder_for
from embedline.embedders import EmbeddingBlock

Health = Literal["sound", "failing", "unknown"]

# What is asked; a handful of tokens.
PROBE_TEXT = "embedline probe"
# An answer says something about the time in which the row failed last.
_VALID_SECONDS = 60.0


@dataclass(frozen=True)
class _Probe:
    future: Future[EmbeddingBlock]
    asked_at: float


def health(session: Session, model: Model) -> Health:
    """Return what the last probe of this session says of a model; without one, or with an old one, ask anew."""
    probes: dict[int, _Probe] = session.cache.setdefault("embedline.probes", {})
    probe = probes.get(model.model_id)
    if probe is None or time.monotonic() - probe.asked_at > _VALID_SECONDS:
        future = embedder_for(session, model).submit([PROBE_TEXT], "document")
        probes[model.model_id] = _Probe(future, time.monotonic())
        return "unknown"
    if not probe.future.done():
        return "unknown"
    if probe.future.exception() is None:
        return "sound"
    # The provider may be back at the next look.
    del probes[model.model_id]
    return "failing"
