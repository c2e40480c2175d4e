"""What one changed word in a document of about 50 chunks costs: the texts that are sent to the provider.

The document is sentences of the PostgreSQL manual in paragraphs of five, cut by the recursive chunker, by estimated
tokens. A word in the middle, at the start and at the end is replaced; then one word of every chunk in turn, by a word
as long, by a longer one and by none.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from harness import Bench, Figure, scalar
from manual import sentences
from workers import Session, create_pipeline, drain, recreate_source, register_stub

from generated_names import BENCH
from stub_provider import StubProvider, stub_provider

CHUNK_TOKENS, CHUNKS = 128, 50
SENTENCES, PARAGRAPH = 120, 5
MOST_SENT = 2
KINDS: dict[str, Callable[[str], str]] = {
    "as long": lambda word: "x" * len(word),
    "longer": lambda word: word + "xxxx",
    "deleted": lambda word: "",
}


def run(bench: Bench) -> None:
    """Edit the document in each way, each time starting from the same text."""
    text = _document()
    with stub_provider(64) as provider, bench.connect() as session:
        model = register_stub(session, provider)
        recreate_source(session)
        create_pipeline(session, model, chunking="recursive", chunk_tokens=CHUNK_TOKENS)
        session.execute("INSERT INTO bench_source (id, body) VALUES (1, %s)", (text,))
        drain(session)
        starts = [row[0] for row in session.execute(f"SELECT start_offset FROM {BENCH('chunk')} ORDER BY seq")]
        if len(starts) not in range(CHUNKS - 2, CHUNKS + 3):
            raise SystemExit(f"the document has {len(starts)} chunks, not about {CHUNKS}")
        bench.add(Figure("chunks of the document", len(starts), "chunks", detail=f"{len(text):,} characters"))
        places = {"in the middle": len(text) // 2, "at the start": 0, "at the end": text.rindex(" ") + 1}
        for place, offset in places.items():
            sent = _sent(session, provider, text, _replaced(text, offset, "longer"))
            bench.add(Figure(f"a word changed {place}: texts sent", sent, "texts", MOST_SENT))
        task = bench.progress.add_task("Editing each chunk", total=len(KINDS) * len(starts))
        for kind in KINDS:
            found = []
            for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
                found.append(_sent(session, provider, text, _replaced(text, (start + end) // 2, kind)))
                bench.progress.update(task, advance=1)
            _report(bench, kind, found)


def _report(bench: Bench, kind: str, found: list[int]) -> None:
    detail = f"mean {statistics.mean(found):.2f} of {len(found)} edits"
    bench.add(Figure(f"one word of each chunk in turn, {kind}: most", max(found), "texts", MOST_SENT, detail))


def _document() -> str:
    found = sentences(SENTENCES)
    paragraphs = [" ".join(found[i : i + PARAGRAPH]) for i in range(0, SENTENCES, PARAGRAPH)]
    return "\n\n".join(paragraphs)


def _replaced(text: str, offset: int, kind: str) -> str:
    """Return the text with the word at or after `offset` replaced."""
    start = 0 if offset == 0 else max(text.rfind(" ", 0, offset), text.rfind("\n", 0, offset)) + 1
    end = next((i for i in range(start, len(text)) if text[i].isspace()), len(text))
    return text[:start] + KINDS[kind](text[start:end]) + text[end:]


def _sent(session: Session, provider: StubProvider, text: str, changed: str) -> int:
    """Put the original back, then make the edit; return how many texts the edit sent."""
    for body in (text, changed):
        provider.counts()
        session.execute("UPDATE bench_source SET body = %s WHERE id = 1", (body,))
        drain(session)
    sent = provider.counts().get("texts", 0)
    stored = scalar(session, f"SELECT string_agg(content, '' ORDER BY seq) FROM {BENCH('chunk')}")
    if stored != changed:
        raise SystemExit("the chunks stored do not rebuild the text")
    return sent
