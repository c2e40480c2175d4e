"""The steps of a resident worker, and the answers that its loop acts on.

Each step is a transaction of its own.
"""

from __future__ import annotations

from enum import StrEnum


class Step(StrEnum):
    """A step of the loop; its value travels through embedline._worker_step."""

    BEGIN = "begin"
    CLAIM = "claim"
    READ = "read"
    SUBMIT = "submit"
    WRITE = "write"
    ABANDON = "abandon"
    RECORD_FAULT = "record_fault"
    IS_WAITING = "is_waiting"
    REPORT = "report"
    END = "end"


class Answer(StrEnum):
    """The result of a step; its value travels back."""

    DONE = "done"
    # Of a claim: a batch; nothing yet, but ask at once; nothing due; or the worker is to stop, which a report says, too.
    BATCH = "batch"
    AGAIN = "again"
    IDLE = "idle"
    STOP = "stop"
    # Of reading and submitting: an application has the source.
    BUSY = "busy"
    # Of a write.
    WRITTEN = "written"
    NOTHING_READY = "nothing_ready"
    # Of the question whether rows wait.
    YES = "yes"
    NO = "no"
