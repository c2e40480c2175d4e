"""Runs a bench: `make bench NAME=capture`, or `.venv/bin/python tests/bench/run.py capture [--save]`.

EMBEDLINE_DSN names a superuser's database on the server to measure; the benches make, use and drop a database of
their own beside it. They exit with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

# The benches share the stub provider with the tests.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from harness import (
    ROOT,
    Bench,
    drop_database,
    machine_facts,
    progress_bars,
    recreate_database,
    register_models,
    save,
    show,
)
from rich.console import Console

BENCHES = {
    "capture": "what the triggers add to INSERT, UPDATE and DELETE of 50,000 rows",
    "create": "create_pipeline on 1,000,000 rows",
    "write": "20,000 vectors of 384 dimensions against psycopg's COPY BINARY",
    "drain-stub": "20,000 rows through one worker and an HTTP stub, against a bare script",
    "drain-latency": "20,000 rows through one worker and a stub that takes 200 ms, against the ideal",
    "remote": "one and four workers outside the database against one in it, behind a stub that takes 200 ms",
    "workers": "1, 2, 4 and 8 workers in the database and outside: rates, processor time, lock waits, even shares",
    "edit": "texts sent where one word of a document of 50 chunks changes",
    "chunking": "each chunker against one encoding with offsets, the share of chunks that counting changes, and a worker",
    "noop": "10,000 updates that change no content",
    "freshness": "from an application's commit to the routing view, at 50 writes a second",
    "scale": "the drain rate with 10,000, 100,000 and 1,000,000 rows stored",
    "memory": "a worker's memory over 1,000,000 rows",
    "in-flight": "transactions, UPDATE and DELETE during a provider call of 10 s",
    "model-host": "100,000 short texts through the model host with a model that computes nothing, against encode with it",
    "images": "images through the model host against the bare encoder, decoding included; edits meanwhile; searches",
    "drain-local": "400 chunks through one worker and a local model, against SentenceTransformer.encode",
    "cutover": "20 cutovers and 20 rollbacks under 8 readers and 2 writers",
    "index": "build-index against a plain CREATE INDEX CONCURRENTLY with the same settings",
    "precision": "recall, time and bytes of the precision indexes on the manual's sentences",
    "ivfflat": "recall, time, build and bytes of IVFFlat against HNSW on 100,000 package summaries, and lists that drift",
    "layout": "filling a table of its own against a second column of indexed rows",
    "query": "the first search of a session and later ones, on 10,000 chunks with HNSW",
    "reach": "whether search finds what exact ranking finds, among 10,000 and 300,000 texts",
    "pipelines": "one pipeline and 1,000: an idle worker, the way from a commit to the view, embedline.status",
    "observe": "the drain rate while all is watched against none, and scrapes with 1,000,000 rows and 1,000 pipelines",
    "hybrid": "the keyword index: 1,000,000 chunks, hybrid against its arms, what writing pays, bytes a chunk",
    "quality": "recall by vectors, keywords and both on labelled queries, with intervals",
    "filter": "recall of filtered searches at 0.1, 1, 10 and 50 % of 100,000 rows",
    "derived": "what derived vectors add to writes of events, and subjects computed a second",
    "session": "the later searches of a session against the first ones, for each kind of key",
}


def main() -> int:
    """Run the benches named; return the number to exit with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHES)}, or all")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of each comparison (7)")
    parser.add_argument("--models", type=Path, default=ROOT / ".models", help="folder of the two local models")
    parser.add_argument(
        "--embedder", metavar="URL", help="an OpenAI-compatible address that has the two models instead"
    )
    parser.add_argument("--save", action="store_true", help="put the figures into tests/bench/RESULTS.md")
    parser.add_argument("--keep", action="store_true", help="leave the bench database when done")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not options.names:
        console.print("Benches: make bench NAME=…")
        for name, what in BENCHES.items():
            console.print(f"  {name:13} {what}", highlight=False)
        return 0
    names = list(BENCHES) if options.names == ["all"] else options.names
    for name in names:
        if name not in BENCHES:
            parser.error(f"there is no bench {name}; there are {', '.join(BENCHES)}")
    dsn = os.environ.get("EMBEDLINE_DSN")
    if not dsn:
        parser.error("set EMBEDLINE_DSN, or run make bench NAME=…")
    return 1 if any([_run(name, dsn, options, console) for name in names]) else 0


def _run(name: str, dsn: str, options: argparse.Namespace, console: Console) -> bool:
    """Run one bench in a fresh database; say whether a target was missed."""
    try:
        with progress_bars(console) as progress:
            task = progress.add_task("Making the bench database", total=2)
            url = recreate_database(dsn)
            progress.update(task, advance=1, description="Registering the models")
            register_models(url, options.models.resolve(), options.embedder)
            progress.remove_task(task)
            bench = Bench(url, options.models, progress, options.rounds)
            import_module(f"bench_{name.replace('-', '_')}").run(bench)
        facts = machine_facts(url)
    finally:
        if not options.keep:
            drop_database(dsn)
    show(console, name, bench, facts)
    if options.save:
        rounds = "" if options.rounds == 7 else f" --rounds {options.rounds}"
        save(name, bench, facts, f"tests/bench/run.py {name}{rounds} --save")
    return any(figure.verdict == "FAIL" for figure in bench.figures)


if __name__ == "__main__":
    sys.exit(main())
