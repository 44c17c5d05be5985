from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_privacy.cli import main

HEAVY = ("torch", "lightning", "transformers", "scipy", "rich", "jsonargparse")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["--version"]])
def test_help_is_there(words, capsys):
    assert main(words) == 0
    assert "lightning-privacy" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from lightning_privacy.cli import main\n"
        "main(['--help']); main(['ponder'])\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_an_unknown_command_is_named(capsys):
    assert main(["ponder"]) == 2
    assert "'ponder'" in capsys.readouterr().err


def test_the_package_is_a_command():
    words = [sys.executable, "-m", "lightning_privacy", "ponder"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("library", "extra"), [("kornia.augmentation", "multimodal"), ("transformers", "llm")]
)
def test_a_missing_library_is_named_with_its_extra(library, extra, monkeypatch, capsys):
    def absent(words):
        raise ModuleNotFoundError(f"No module named '{library}'", name=library)

    monkeypatch.setattr("lightning_privacy.cli._run", absent)
    assert main(["fit"]) == 2
    assert f'pip install ".[{extra}]"' in capsys.readouterr().err


def test_another_missing_module_is_an_error_as_it_was(monkeypatch):
    def absent(words):
        raise ModuleNotFoundError("No module named 'mine'", name="mine")

    monkeypatch.setattr("lightning_privacy.cli._run", absent)
    with pytest.raises(ModuleNotFoundError, match="mine"):
        main(["fit"])


def test_what_the_trainer_refuses_has_no_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    words = ["fit", "--config", recipe, "--seed_everything=false", "--trainer.accelerator=cuda"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "lightning-privacy stopped: MisconfigurationException" in said
    assert "Traceback" not in said
