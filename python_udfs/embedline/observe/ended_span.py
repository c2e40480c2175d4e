"""A span that has ended, as a session queues it for its exporter."""

from __future__ import annotations

from collections.abc import Mapping

from embedline.postgres.spans import Attributes


class Ended:
    """A span that has ended, as the session appends it."""

    __slots__ = ("attributes", "error", "finished_ns", "name", "started_ns")

    def __init__(
        self, name: str, started_ns: int, finished_ns: int, attributes: Attributes, error: BaseException | None
    ) -> None:
        self.name = name
        self.started_ns = started_ns
        self.finished_ns = finished_ns
        self.attributes: Mapping[str, object] = attributes
        self.error: tuple[str, str | None] | None = None
        if error is not None:
            # Not its message: that may quote a text.
            self.error = (type(error).__name__, getattr(error, "sqlstate", None))
