"""The environment that the two commands of the README create is pinned and complete."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lightning_privacy

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# There is no CPU build of these; asking for one of them replaces torch by a CUDA build.
NEVER = {"torchaudio", "torchcodec", "torchvision", "triton"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def installed_by_make() -> list[Requirement]:
    extras = sorted(Requirement(EXTRAS["dev"][0]).extras)
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("requirement", installed_by_make(), ids=lambda item: item.name)
def test_every_requirement_has_a_pin_that_satisfies_it(requirement: Requirement) -> None:
    version = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


def test_torch_is_pinned_to_the_cpu_build_that_exists() -> None:
    assert pins()["torch"] == "2.13.0"


def test_nothing_asks_for_a_package_that_would_replace_torch() -> None:
    asked = {Requirement(line).name for lines in EXTRAS.values() for line in lines}
    asked |= {Requirement(line).name for line in PROJECT["dependencies"]}
    assert not NEVER & (asked | pins().keys())
    assert not [name for name in pins() if name.startswith(("nvidia", "cuda"))]


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_withdrawn_lightning_releases_are_excluded(version: str) -> None:
    (lightning,) = (r for r in installed_by_make() if r.name == "lightning")
    assert not lightning.specifier.contains(version)


def test_one_version_everywhere() -> None:
    version = lightning_privacy.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^version: {re.escape(version)}$", citation, re.MULTILINE)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_types_are_shipped() -> None:
    assert (ROOT / "lightning_privacy" / "py.typed").is_file()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "\nmake test\n" in script.read_text()
    assert "make test" in (ROOT / "README.md").read_text()
