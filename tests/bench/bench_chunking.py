"""Each chunker beside one encoding, with offsets, of the same texts.

The texts are 4,000 characters of the PostgreSQL manual each, in chunks of 256 tokens. Times are processor time of this
process. A round begins with a measure that knows no word yet; "words known" is a second pass over the same texts.
"each candidate encoded" asks the tokenizer for each size, as is done where it does not work word by word.

Its chunks are compared with ours. The texts for that are the same ones, each tenth page of the manual, and what Django
has in each of its languages. Last, a worker drains the texts behind a stub that answers at once.
"""

from __future__ import annotations

import gettext
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import django
from harness import MODELS, Bench, Figure, scalar
from manual import pages
from tokenizers import Tokenizer
from workers import create_pipeline, drain, processor_seconds, recreate_source, spread

from embedline.chunking import Chunk
from embedline.chunking.fixed import fixed_split
from embedline.chunking.markdown import markdown_split
from embedline.chunking.measure import TokenMeasure
from embedline.chunking.measured import MeasuredChunker, Split
from embedline.chunking.recursive import recursive_split
from embedline.chunking.sentences import sentences_split
from generated_names import BENCH
from stub_provider import stub_provider

CHARACTERS, TOKENS, TEXTS = 4_000, 256, 250
SHARE = 0.7
SPLITS: dict[str, Split] = {
    "recursive": recursive_split,
    "sentences": sentences_split,
    "markdown": markdown_split,
    "fixed": fixed_split,
}
WARM, ENCODED = "words known", "each candidate encoded"
DIMENSIONS = 384
# Copies of the texts that the worker drains.
COPIES = 4


# As in a worker's session: no threads of the tokenizer's own.
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class EncodingMeasure(TokenMeasure):
    """Encode each text that is measured."""

    parts = None


def run(bench: Bench) -> None:
    """Measure both models' tokenizers, then the worker."""
    found = pages()
    texts = _pieces(found)[:TEXTS]
    compared = [*texts, *found[::10], *_translations()]
    task = bench.progress.add_task("Chunking", total=len(MODELS) * (bench.rounds + len(SPLITS)))
    for model in MODELS:
        tokenizer = _tokenizer(bench.models / model)
        seconds: dict[str, list[float]] = {name: [] for name in ("encode", *SPLITS, WARM, ENCODED)}
        for _ in range(bench.rounds):
            for name, action in _sides(tokenizer, texts).items():
                seconds[name].append(_cpu_seconds(action))
            bench.progress.update(task, advance=1)
        _report(bench, model, texts, seconds)
        for method, split in SPLITS.items():
            same, chunks = _same(tokenizer, split, compared)
            detail = f"of {chunks:,} chunks of {len(compared):,} texts"
            bench.add(Figure(f"{method}, {model}: same chunks", 100 * same / chunks, "%", 100, detail, at_least=True))
            bench.progress.update(task, advance=1)
    _work(bench, texts)


def _sides(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Callable[[], object]]:
    def chunk(measure: TokenMeasure, split: Split) -> Callable[[], object]:
        chunker = MeasuredChunker(measure, TOKENS, 0, split)
        return lambda: [chunker(text) for text in texts]

    recursive = chunk(TokenMeasure(tokenizer), recursive_split)
    others = {
        method: chunk(TokenMeasure(tokenizer), split) for method, split in SPLITS.items() if method != "recursive"
    }
    return {
        "encode": lambda: [tokenizer.encode(text, add_special_tokens=False).offsets for text in texts],
        "recursive": recursive,
        WARM: recursive,
        **others,
        ENCODED: chunk(EncodingMeasure(tokenizer), recursive_split),
    }


def _report(bench: Bench, model: str, texts: Sequence[str], seconds: dict[str, list[float]]) -> None:
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rate = {name: megabytes / statistics.median(found) for name, found in seconds.items()}
    for name in ("recursive", WARM, ENCODED, "sentences", "markdown", "fixed"):
        ratios = [b / a for a, b in zip(seconds[name], seconds["encode"], strict=True)]
        label = f"{name}, {model}" if name in SPLITS else f"  {name}"
        detail = f"{rate[name]:.2f} MB/s against {rate['encode']:.2f} MB/s; {spread(ratios)}"
        limit = SHARE if name == "recursive" else None
        bench.add(Figure(label, statistics.median(ratios), "×", limit, detail, at_least=True))


def _same(tokenizer: Tokenizer, split: Split, texts: Sequence[str]) -> tuple[int, int]:
    """Return how many chunks are ours, too, of those with each candidate encoded."""
    ours = MeasuredChunker(TokenMeasure(tokenizer), TOKENS, 0, split)
    theirs = MeasuredChunker(EncodingMeasure(tokenizer), TOKENS, 0, split)
    same = total = 0
    for text in texts:
        wanted: list[Chunk] = theirs(text)
        total += len(wanted)
        same += len(set(wanted) & set(ours(text)))
    return same, total


def _work(bench: Bench, texts: Sequence[str]) -> None:
    rates, costs = list[float](), list[float]()
    with stub_provider(DIMENSIONS) as provider, bench.connect() as session:
        options = f'{{"tokenizer": "{(bench.models / "minilm" / "tokenizer.json").resolve()}"}}'
        query = "SELECT embedline.create_model('stub', 'openai', 'stub', base_url => %s, options => %s::jsonb)"
        scalar(session, query, (provider.url, options))
        for number in range(bench.rounds):
            recreate_source(session)
            create_pipeline(session, "stub", chunk_tokens=TOKENS)
            rows = [(id, f"{id}.{number} {text}") for id, text in enumerate(texts * COPIES)]
            with session.cursor() as cursor:
                cursor.executemany("INSERT INTO bench_source (id, body) VALUES (%s, %s)", rows)
            used = processor_seconds(session.info.backend_pid)
            seconds = drain(session)
            used = processor_seconds(session.info.backend_pid) - used
            chunks = scalar(session, f"SELECT count(*) FROM {BENCH.version(1)}")
            rates.append(chunks / seconds)
            costs.append(1000 * used / chunks)
    bench.add(Figure("a worker on these texts", statistics.median(rates), "chunks/s", detail=spread(rates, ",.0f")))
    bench.add(Figure("  CPU time of its backend", statistics.median(costs), "ms/chunk", detail=spread(costs)))


def _pieces(found: Sequence[str]) -> list[str]:
    """Cut pages into texts of 4,000 characters, evenly from all of the manual."""
    pieces = [page[at : at + CHARACTERS] for page in found for at in range(0, len(page) - CHARACTERS, CHARACTERS)]
    return pieces[:: max(len(pieces) // TEXTS, 1)]


def _translations() -> list[str]:
    """Return Django's messages in each language, in paragraphs."""
    texts: list[str] = []
    root = Path(django.__file__).parent
    files = sorted(root.glob("**/LC_MESSAGES/*.mo"), key=lambda path: path.parents[1].name)
    for _, catalogues in itertools.groupby(files, key=lambda path: path.parents[1].name):
        messages: list[str] = []
        for catalogue in catalogues:
            with catalogue.open("rb") as file:
                messages += dict.fromkeys(filter(None, gettext.GNUTranslations(file)._catalog.values()))  # type: ignore[attr-defined]
        texts.append("\n\n".join(messages))
    return texts


def _tokenizer(folder: Path) -> Tokenizer:
    tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _cpu_seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start
