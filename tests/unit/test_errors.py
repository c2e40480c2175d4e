"""The exception tree, and how it reaches PostgreSQL."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import pytest

from embedline import errors
from embedline.database import postgres_error
from embedline.errors import EmbedlineError, InvalidParameter, TransientProviderError


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
    assert cls().message == inspect.cleandoc(cls.__doc__ or "") == str(cls())


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
