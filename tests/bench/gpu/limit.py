"""Measure what the device and the tokenizer could do alone, and compare vectors.

Usage: `limit.py MODEL SHORT LONG DEVICE COUNT`. The texts' tokens are ready before the passes are measured. Two slices are
begun at once where the device allows it, as in the model host.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from observing import result

from embedline.model_host.flat_transformer import FlatTransformer, flat_transformer
from embedline.model_host.host_settings import HostSettings
from embedline.model_host.torch_backend import load_torch

model_dir, short_path, long_path, device, count = sys.argv[1:]
number, few = int(count), 16 if device == "cpu" else 512
short = Path(short_path).read_text(encoding="utf-8").splitlines()[:number]
joined = Path(long_path).read_text(encoding="utf-8").replace("\f", "\n\n")
pages = max(few, number // 10)
step = max(1, (len(joined) - 1400) // pages)
long = [joined[start : start + 1400] for start in range(0, len(joined) - 1400, step)][:pages]
# Each slice is sorted for itself, as requests are.
SLICES = (4096,) if device == "cpu" else (65_536, 262_144, 1_048_576)
PRECISIONS = ("float32", "float16") if device == "cpu" else ("float32", "float16", "bfloat16")


def passes(flat: FlatTransformer, name: str, texts: list[str]) -> None:
    """Put down the rates of tokens and of passes."""
    began = time.perf_counter()
    tokens = flat.tokenize(texts)
    mean, took = float(tokens.lengths.mean()), time.perf_counter() - began
    result(f"limit_tokenize_{name}", len(texts) / took, "texts/s", f"called by one thread, mean {mean:.1f} tokens")
    for tokens_a_slice in SLICES:
        size = max(1, int(tokens_a_slice / mean))
        slices = [range(start, min(start + size, len(texts))) for start in range(0, len(texts), size)]
        flat.start(tokens.select(slices[0]))()
        began, waiting = time.perf_counter(), deque[Any]()
        for indexes in slices:
            waiting.append(flat.start(tokens.select(indexes)))
            if len(waiting) >= flat.in_flight:
                waiting.popleft()()
        while waiting:
            waiting.popleft()()
        took = time.perf_counter() - began
        result(f"limit_forward_{name}_{tokens_a_slice}", len(texts) / took, "texts/s", f"{len(slices)} slices")


wanted: Any = None
for precision in PRECISIONS:
    backend = load_torch(HostSettings(model_dir, device=device, precision=precision))
    flat = flat_transformer(backend.model)
    assert flat is not None
    sample = short[:few] + long[:few]
    if wanted is None:
        # What SentenceTransformer.encode gives in full precision.
        wanted = backend.forward(sample)
    found = flat.start(flat.tokenize(sample))()
    cosines = np.einsum("ij,ij->i", found, wanted) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    result(f"limit_{precision}_least_cosine", f"{cosines.min():.7f}", "-", f"{len(sample)} texts, to encode in float32")
    if device != "cpu" or precision == "float32":
        for name, texts in (("short", short), ("long", long)):
            passes(flat, f"{precision}_{name}", texts)
