"""Files and functions stay small enough to be read in one go."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_LINES = 400
FUNCTION_LINES = 40
SOURCES = sorted(
    path for folder in ("lightning_privacy", "recipes") for path in (ROOT / folder).rglob("*.py")
)


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines without its docstring.

    A constructor's signature (that of ``__init__`` or of a class method) does not count, which is a
    list of settings, one to a line; nor does a class inside a function, whose methods are measured
    on their own.
    """
    first = node.body[0]
    builds = node.name == "__init__" or any(
        isinstance(decorator, ast.Name) and decorator.id == "classmethod"
        for decorator in node.decorator_list
    )
    start = first.lineno if builds else node.lineno
    lines = (node.end_lineno or start) - start + 1
    if ast.get_docstring(node, clean=False) is not None:
        lines -= span(first)
    return lines - sum(span(inner) for inner in node.body if isinstance(inner, ast.ClassDef))


def span(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def too_long(source: str) -> list[str]:
    return [
        f"{node.name}: {function_lines(node)} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and function_lines(node) > FUNCTION_LINES
    ]


def test_there_is_something_to_measure() -> None:
    assert SOURCES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    lines = source.count("\n")
    assert lines < FILE_LINES
    assert too_long(source) == []


def test_the_check_can_fail() -> None:
    body = "\n".join("    pass" for _ in range(FUNCTION_LINES))
    assert too_long(f"def f():\n{body}\n") == ["f: 41 lines"]
    assert too_long(f'def f():\n    """Say\n    more."""\n{body[: -len("    pass")]}\n') == []
