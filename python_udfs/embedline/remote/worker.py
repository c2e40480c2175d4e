"""The remote worker: several requests in flight, each answered by itself."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace

import psycopg

from embedline.core.embedding import Embedder, EmbeddingBlock
from embedline.core.processes import prepare_environment
from embedline.embedders import create_embedder
from embedline.errors import ModelChanged, NotReady
from embedline.remote.failures import failure_class, told, wait_wanted
from embedline.remote.session import Claim, RemoteSession, ServedModel, connector

# Seconds between two claims while nothing waits, and between two looks at the request to stop.
_IDLE_SECONDS, _LOOK_SECONDS = 0.5, 0.2
# Seconds until the first try to connect again, and at most; each is twice the last.
_RECONNECT_SECONDS = (0.2, 10.0)
# Seconds for which a worker that is asked to stop waits for what is in flight.
_GRACE_SECONDS = 30.0
# Requests to a model on this machine that may be in flight: the host embeds one while the next ones arrive.
_LOCAL_REQUESTS = 8
# The counters of a worker, by their names in Totals.
_COUNTERS = {
    "rows": "Rows that this worker has embedded.",
    "texts": "Texts whose vectors it has handed back.",
    "requests": "Requests that the model has answered, well or not.",
    "failed_requests": "Requests that failed or whose answer was refused.",
    "lost_requests": "Requests whose answer was lost with the connection, or at the end.",
    "connections": "Connections to the database, the first one included.",
}
# Errors of a call that say that the claim is gone, or that the answer is refused.
_NO_CLAIM, _REFUSED = ("55000",), ("EL014", "EL004", "22023")
# The error of a call that was cancelled: by a person, by a time limit, or by the row that it read.
_CANCELLED = "57014"


@dataclass
class Totals:
    """What a worker has done."""

    rows: int = 0
    texts: int = 0
    requests: int = 0
    failed_requests: int = 0
    lost_requests: int = 0
    connections: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        """Tell it in words."""
        words = f"{self.rows:,} rows embedded, {self.texts:,} texts in {self.requests:,} requests"
        if self.failed_requests:
            words += f", {self.failed_requests:,} requests failed"
        if self.lost_requests:
            words += f", {self.lost_requests:,} answers lost with their connection"
        return words

    def metrics(self) -> str:
        """Return the counts in Prometheus' text format."""
        return "".join(
            f"# HELP embedline_remote_{name}_total {told}\n# TYPE embedline_remote_{name}_total counter\n"
            f"embedline_remote_{name}_total {getattr(self, name)}\n"
            for name, told in _COUNTERS.items()
        )


@dataclass
class _Flight:
    claim: Claim
    future: Future[EmbeddingBlock]


@dataclass
class Worker:
    """Embeds a pipeline from outside its database.

    `dsn` is a connection string of libpq for a login in the role embedline_remote, to which the pipeline was granted. `version`
    limits the work to one version; without one, changes are embedded, and the fills of versions with the same model. `requests`
    is how many are in flight at the model; as many again are fetched meanwhile. `make_embedder` may replace the embedder of the
    registered model. It is called again once another model serves.
    """

    dsn: str
    pipeline: str
    version: int | None = None
    requests: int | None = None
    max_rows: int | None = None
    max_tokens: int | None = None
    make_embedder: Callable[[ServedModel], Embedder] | None = None
    say: Callable[[str], None] = field(default=lambda message: None)
    totals: Totals = field(default_factory=Totals)

    def __post_init__(self) -> None:
        """Prepare what the threads share."""
        self._stopped = threading.Event()
        self._flights: list[_Flight] = []
        self._embedder: Embedder | None = None
        self._model: ServedModel | None = None
        self._depth = 1

    def stop(self) -> None:
        """Ask the worker to end once what is in flight is written.

        May be called from a signal handler or another thread.
        """
        self._stopped.set()

    def run(self, *, until_empty: bool = False) -> Totals:
        """Embed until `stop`, or until nothing waits; return what was done.

        A lost connection is opened again, and so is one whose call was cancelled, which a row may do that is read. What was in
        flight then is embedded by the next worker that claims it.
        """
        prepare_environment()
        started, pause = time.monotonic(), _RECONNECT_SECONDS[0]
        try:
            while True:
                session: RemoteSession | None = None
                try:
                    session = RemoteSession(connector(self.dsn), self.pipeline, self.version)
                    self.totals.connections += 1
                    self._prepare(session.model())
                    pause = _RECONNECT_SECONDS[0]
                    if self._work(session, until_empty=until_empty) or self._stopped.is_set():
                        return self.totals
                except psycopg.Error as error:
                    is_lost = session.is_lost if session is not None else self.totals.connections > 0
                    is_cancelled = session is not None and error.sqlstate == _CANCELLED
                    if self._stopped.is_set() or not (is_lost or is_cancelled):
                        raise
                    self._forget_flights()
                    self.say(f"{_loss(is_lost)} and the worker connects again in {pause:.1f} s: {error}".strip())
                    if session is not None and not is_lost:
                        # Only what was read when the cancel came is suspected.
                        with contextlib.suppress(psycopg.Error):
                            session.release()
                finally:
                    if session is not None:
                        session.close()
                self._stopped.wait(pause)
                pause = min(2 * pause, _RECONNECT_SECONDS[1])
        finally:
            self.totals.seconds += time.monotonic() - started
            self._forget_flights()
            if self._embedder is not None:
                self._embedder.close()
                self._embedder = None

    def _prepare(self, model: ServedModel) -> None:
        """Make the embedder, once for all connections unless the model changes."""
        if self._embedder is not None:
            if self._model is not None and _is_same(self._model, model):
                return
            self._embedder.close()
            self._embedder = None
        self._model = model
        config = model.config
        if self.make_embedder is not None:
            self._embedder = self.make_embedder(model)
        else:
            self._embedder = create_embedder(config)
            if config.provider == "sentence-transformers":
                self._require_same_vectors(model, self._embedder)
        is_local = config.provider == "sentence-transformers"
        self._depth = self.requests or (_LOCAL_REQUESTS if is_local else config.concurrency)

    def _require_same_vectors(self, model: ServedModel, embedder: Embedder) -> None:
        found = embedder.probe().result().fingerprint
        if model.fingerprint is not None and found != model.fingerprint:
            raise NotReady(
                f'model "{model.config.name}" is another one on this machine',
                detail=f"Its fingerprint is {found} here, and {model.fingerprint} in the database.",
                hint="Install the files that the database was given: the same revision in the same place.",
            )

    def _work(self, session: RemoteSession, *, until_empty: bool) -> bool:
        """Fetch, embed and hand back, until the end.

        Return False if the end is that another model is to be embedded with.
        """
        ask_at, is_empty, give_up_at, is_outdated = 0.0, False, float("inf"), False
        while True:
            if self._stopped.is_set() and give_up_at == float("inf"):
                give_up_at = time.monotonic() + _GRACE_SECONDS
            # As many requests again wait for their turn: the model never runs dry while the next ones are fetched.
            room = 2 * self._depth - len(self._flights)
            if not self._stopped.is_set() and not is_outdated and room > 0 and time.monotonic() >= ask_at:
                try:
                    state, claims = session.claim(self.max_rows, self.max_tokens, room)
                except psycopg.Error as error:
                    if error.sqlstate != ModelChanged.sqlstate:
                        raise
                    # What is in flight is of the model that this worker has.
                    self.say(f"{error.diag.message_primary}, and the worker asks for it")
                    is_outdated = True
                    continue
                self._send(claims)
                is_empty = state == "empty"
                ask_at = time.monotonic() + (0.0 if state in ("batch", "claimed") else _IDLE_SECONDS)
                if state == "stop":
                    self.stop()
            if not self._flights and (self._stopped.is_set() or is_outdated or (until_empty and is_empty)):
                break
            if time.monotonic() >= give_up_at:
                break
            if self._hand_back(session, ask_at if room > 0 and not is_outdated else float("inf")):
                # A failure may have split a request, and a row that is through makes room.
                ask_at = 0.0
        self._forget_flights()
        session.release()
        return not is_outdated

    def _send(self, claims: list[Claim]) -> None:
        for claim in claims:
            if self._embedder is not None:
                self._flights.append(_Flight(claim, self._embedder.submit(claim.texts, "document")))

    def _hand_back(self, session: RemoteSession, ask_at: float) -> bool:
        """Wait for answers and hand them back; return True if there was one."""
        seconds = max(min(ask_at - time.monotonic(), _LOOK_SECONDS), 0.0)
        if not self._flights:
            self._stopped.wait(seconds)
            return False
        done, _ = wait([flight.future for flight in self._flights], timeout=seconds, return_when=FIRST_COMPLETED)
        for flight in [flight for flight in self._flights if flight.future in done]:
            self._flights.remove(flight)
            self._answer(session, flight)
        return bool(done)

    def _answer(self, session: RemoteSession, flight: _Flight) -> None:
        self.totals.requests += 1
        error = flight.future.exception()
        try:
            if error is None:
                block = flight.future.result()
                self.totals.rows += session.finish(flight.claim, block.data, block.tokens)
                self.totals.texts += len(flight.claim.texts)
                return
            self.totals.failed_requests += 1
            self._fail(session, flight.claim, failure_class(error), told(error), wait_wanted(error))
        except psycopg.Error as refused:
            if session.is_lost:
                raise
            self.totals.failed_requests += 1
            self.say(f"claim {flight.claim.number}: {refused}".strip())
            if refused.sqlstate in _REFUSED:
                self._fail(session, flight.claim, "invalid_vectors", str(refused.diag.message_primary), None)
            elif refused.sqlstate not in _NO_CLAIM:
                raise

    def _fail(self, session: RemoteSession, claim: Claim, kind: str, detail: str, wait: float | None) -> None:
        try:
            session.fail(claim, kind, detail, wait)
        except psycopg.Error as gone:
            if gone.sqlstate not in _NO_CLAIM:
                raise
            self.say(f"claim {claim.number}: {gone}".strip())

    def _forget_flights(self) -> None:
        for flight in self._flights:
            flight.future.cancel()
        self.totals.lost_requests += len(self._flights)
        self._flights = []


def _is_same(one: ServedModel, other: ServedModel) -> bool:
    """Return True if two answers tell of the same model.

    What its provider has shown meanwhile does not count.
    """
    facts = [replace(model.config, learned={}, max_batch_items=0) for model in (one, other)]
    return facts[0] == facts[1] and one.fingerprint == other.fingerprint


def _loss(is_lost: bool) -> str:
    return "the connection is lost" if is_lost else "a call was cancelled"
