"""Modules and signatures stay small enough to be read at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import embedline

_PACKAGE = Path(embedline.__file__).parent
_MODULE_LINES = 400
_PARAMETERS = 6
# Decorators of functions whose parameters are an interface of their own: the arguments of an SQL function, and the options
# of a command, each of which typer reads from a parameter.
_INTERFACES = ("entry_point", "app.command")


def _modules() -> Iterator[tuple[str, str]]:
    for path in sorted(_PACKAGE.rglob("*.py")):
        yield path.relative_to(_PACKAGE).as_posix(), path.read_text(encoding="utf-8")


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def test_no_module_is_longer_than_the_limit() -> None:
    long = {name: text.count("\n") for name, text in _modules() if text.count("\n") > _MODULE_LINES}
    assert long == {}


def test_only_interfaces_have_many_parameters() -> None:
    functions = 0
    found = {}
    for name, text in _modules():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            functions += 1
            if any(ast.unparse(decorator).startswith(_INTERFACES) for decorator in node.decorator_list):
                continue
            if len(_parameters(node)) > _PARAMETERS:
                found[f"{name}: {node.name}"] = _parameters(node)
    assert functions > 0
    assert found == {}
