"""What a page shows of the repository exists, and the examples among it are run by a test."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import PAGES, ROOT

INCLUDED = sorted(
    {name for page in PAGES for name in re.findall(r'--8<-- "(.+)"', page.read_text())}
)


@pytest.mark.parametrize("name", INCLUDED)
def test_an_included_file_exists(name: str) -> None:
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("name", [name for name in INCLUDED if name.startswith("recipes/")])
def test_an_included_recipe_is_run_by_the_tests_of_the_recipes(name: str) -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "recipes").glob("test_*.py"))
    assert name.rpartition("/")[2].partition(".")[0] in tests
