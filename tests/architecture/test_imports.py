"""The import contracts of pyproject.toml hold, and can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()",
         "--no-cache"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip


def test_every_contract_is_kept() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lightning_privacy", directory / "lightning_privacy", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", directory)
    return directory


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("noise/__init__.py", "import lightning_privacy.accounting"),
        ("plan.py", "import lightning_privacy.step"),
        ("sampling/__init__.py", "def f():\n    import lightning"),
        ("clipping/__init__.py", "import transformers"),
        ("models/__init__.py", "import lightning_privacy.clipping"),
        ("callbacks/__init__.py", "import lightning_privacy.data"),
        ("strategies/__init__.py", "import lightning_privacy.callbacks"),
        ("misplaced.py", ""),
    ],
)
def test_a_planted_violation_is_refused(copy: Path, module: str, line: str) -> None:
    path = copy / "lightning_privacy" / module
    before = path.read_text() if path.exists() else None
    path.write_text(f"{before or ''}\n{line}\n")
    try:
        assert lint_imports(copy).returncode == 1
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_text(before)
