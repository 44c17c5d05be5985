"""What must not be written anywhere in the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKIPPED = {".git", ".venv", "site", "dist", "build", "__pycache__", "lightning_logs", "runs"}
TEXT = {"", ".cfg", ".cff", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}
# A vertical stroke stands inside each word, so that this file does not hold what it forbids.
FORBIDDEN = {
    "the path of one machine": r"(?<![\w.])/(?:wo‖rk|ro‖ot|ho‖me|o‖pt)/\w",
    "the host of a package registry": r"py‖pi\.org|python‖hosted|download\.py‖torch",
    "an index of packages": r"--(?:extra-)?in‖dex-url|--find-‖links",
}
NAMELESS = {"utils", "util", "helpers", "misc", "common"}


def text_files(root: Path) -> list[Path]:
    return sorted(
        path
        for path in root.rglob("*")
        if path.is_file()
        and path.suffix in TEXT
        and not any(
            part in SKIPPED or part.endswith("_cache") or part == ".hypothesis"
            for part in path.relative_to(root).parts
        )
    )


def offences(text: str) -> list[str]:
    return [
        name for name, pattern in FORBIDDEN.items() if re.search(pattern.replace("‖", ""), text)
    ]


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = {
        str(path.relative_to(ROOT)): offences(path.read_text(errors="replace"))
        for path in text_files(ROOT)
    }
    assert {name: what for name, what in found.items() if what} == {}


def test_no_module_has_a_name_that_says_nothing() -> None:
    modules = (ROOT / "lightning_privacy").rglob("*")
    assert [str(path) for path in modules if path.stem in NAMELESS] == []


@pytest.mark.parametrize(
    "text", ["see /wo‖rk/main", "pip install --in‖dex-url x", "at py‖pi.org", "cd /ro‖ot/x"]
)
def test_the_check_can_fail(text: str) -> None:
    assert offences(text.replace("‖", ""))
