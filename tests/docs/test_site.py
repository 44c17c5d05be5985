"""The site builds without a warning, and names everything that is public."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    result = subprocess.run(
        [*command, str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return directory


def test_the_site_has_its_pages(site: Path) -> None:
    assert (site / "index.html").is_file()
    assert (site / "tutorials" / "quickstart" / "index.html").is_file()


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    import lightning_privacy

    reference = "".join(page.read_text() for page in (site / "reference").rglob("*.html"))
    names = set(lightning_privacy.__all__) - {"__version__"}
    missing = {name for name in names if f'.{name}"' not in reference}
    assert missing == set()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    text = (site / "index.html").read_text()
    assert "fonts.googleapis" not in text
    assert 'src="https://' not in text
