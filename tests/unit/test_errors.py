"""The exception tree, and how it reaches PostgreSQL."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterator

import pytest

from embedline import errors
from embedline.errors import EmbedlineError, InvalidParameter, TransientProviderError
from embedline.postgres.entry import entry_point, postgres_error
from embedline.postgres.session import Session


def _classes(top: type[EmbedlineError] = EmbedlineError) -> Iterator[type[EmbedlineError]]:
    yield top
    for child in top.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _classes(child)


CLASSES = sorted(set(_classes()), key=lambda c: c.__name__)


@pytest.mark.parametrize("cls", CLASSES)
def test_each_class_has_a_sqlstate_and_its_docstring_is_its_message(cls: type[EmbedlineError]) -> None:
    assert re.fullmatch(r"[0-9A-Z]{5}", cls.sqlstate)
    assert "sqlstate" in vars(cls), "inherits another class's SQLSTATE"
    assert cls().message == inspect.cleandoc(cls.__doc__ or "").partition("\n")[0] == str(cls())


def test_no_two_classes_share_a_sqlstate() -> None:
    states = [cls.sqlstate for cls in CLASSES]
    assert sorted(states) == sorted(set(states))


class _Plpy:
    class Error(Exception):
        pass


def test_an_error_reaches_postgresql_with_its_sqlstate_detail_and_hint() -> None:
    error = InvalidParameter("wrong", detail="why", hint="do this")
    raised = postgres_error(_Plpy, error)
    assert isinstance(raised, _Plpy.Error)
    assert (str(raised), raised.sqlstate, raised.detail, raised.hint) == ("wrong", "22023", "why", "do this")


def test_an_error_without_detail_and_hint_sets_none() -> None:
    raised = postgres_error(_Plpy, InvalidParameter("wrong"))
    assert not hasattr(raised, "detail")
    assert not hasattr(raised, "hint")


def test_a_transient_error_carries_the_providers_wish() -> None:
    error = TransientProviderError("later", retry_after=3.5, throttled=True)
    assert (error.retry_after, error.throttled) == (3.5, True)


class _ServerError(_Plpy.Error):
    """What SPI raises, with the SQLSTATE of a statement that failed."""

    def __init__(self, sqlstate: str) -> None:
        super().__init__("the server's message")
        self.sqlstate = sqlstate
        self.spidata = (None, "why", "do this", None, None)


@pytest.mark.parametrize(
    "error", [InvalidParameter("wrong"), _ServerError("55P03"), _ServerError("57014"), _ServerError("42501")]
)
def test_an_error_that_is_meant_for_the_caller_leaves_without_our_frames(error: Exception) -> None:
    def fail(session: Session) -> None:
        raise error

    with pytest.raises(_Plpy.Error) as caught:
        entry_point(fail)(_Plpy, {"embedline.version_checked": True})  # type: ignore[arg-type]
    assert [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)] == [
        test_an_error_that_is_meant_for_the_caller_leaves_without_our_frames.__name__
    ]
    assert caught.value.sqlstate == error.sqlstate


@pytest.mark.parametrize("error", [ZeroDivisionError(), _ServerError("42883")])
def test_a_defect_keeps_its_frames(error: Exception) -> None:
    def fail(session: Session) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        entry_point(fail)(_Plpy, {"embedline.version_checked": True})  # type: ignore[arg-type]
    assert "fail" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
