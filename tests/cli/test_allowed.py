"""A recipe builds parts of a training, and is no way to run a program."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_privacy.cli import main
from lightning_privacy.cli.allowed import AllowedClasses, without_option
from lightning_privacy.cli.training import PrivacyCLI, read_recipe
from lightning_privacy.errors import ConfigurationError

OWN = """
from pathlib import Path
import lightning as L
from lightning_privacy.models import CausalLanguageModel

Path("imported").touch()

class Model(CausalLanguageModel):
    pass

class Watch(L.Callback):
    pass

class Program:
    def __init__(self, command: str = "") -> None:
        Path("ran").touch()

def program() -> L.Callback:
    Path("ran").touch()
    return Watch()

"""


@pytest.fixture
def own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (folder / "own_project.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("own_project", None)


def callback(path: str) -> str:
    return f"trainer: {{callbacks: [{{class_path: {path}}}]}}"


def plan(folder: Path, text: str, *words: str) -> Any:
    (folder / "more.yaml").write_text(text)
    return read_recipe(["--config", "recipe.yaml", "--config", "more.yaml", *words])


@pytest.mark.parametrize(
    "text",
    [
        "model: {class_path: os.system, init_args: {command: touch ran}}",
        callback("subprocess.Popen"),
        "trainer: {logger: {class_path: subprocess.run, init_args: {args: touch ran}}}",
        "trainer: {plugins: [{class_path: runpy.run_path}]}",
        "data: {class_path: builtins.exec}",
        "model: {init_args: {tokenizer: {class_path: os.system}}}",
    ],
)
def test_the_standard_library_is_refused_before_anything_is_parsed(
    recipe: str, folder: Path, text: str
) -> None:
    with pytest.raises(ConfigurationError, match="Python's standard library"):
        plan(folder, text)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--model.class_path=os.system"],
        ["--model.class_path", "os.system"],
        ["--model", "{class_path: os.system}"],
        ["--model={class_path: os.system}"],
        ["--trainer.callbacks+=[{class_path: os.system}]"],
        ["--model", "model.yaml"],
    ],
)
def test_so_it_is_in_options_and_in_files_that_they_name(
    recipe: str, folder: Path, words: list[str]
) -> None:
    (folder / "model.yaml").write_text("class_path: os.system")
    with pytest.raises(ConfigurationError, match="os.system"):
        read_recipe(["--config", recipe, *words])


def test_the_command_line_says_so_and_exits(
    recipe: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "more.yaml").write_text(callback("os.system"))
    assert main(["fit", "--config", recipe, "--config", "more.yaml"]) == 2
    assert "os.system, which belongs to Python's standard library" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["own_project.Program", "own_project.program"])
def test_what_is_no_part_of_a_training_is_not_built(own: Path, recipe: str, path: str) -> None:
    text = f"privacy: {{ledger: {{class_path: {path}}}}}"
    with pytest.warns(UserWarning, match=f"builds {path}"):
        with pytest.raises((ConfigurationError, SystemExit)):
            plan(own, text)
    assert not (own / "ran").exists()


@pytest.mark.parametrize(
    "path", ["torch.hub.load", "torch.load", "torch.multiprocessing.Process", "torch.no_such"]
)
def test_nor_is_anything_else_of_an_allowed_package(path: str) -> None:
    with pytest.raises(ConfigurationError, match="no class|no part of a training"):
        AllowedClasses().check({"x": [{"class_path": path}]})


def test_functions_come_from_this_package_or_are_named() -> None:
    # An option that takes a function gets it from the parser.
    config = {"privacy": {"users": [shutil.rmtree]}}
    with pytest.raises(ConfigurationError, match="shutil.rmtree, a function"):
        AllowedClasses().check(config)
    AllowedClasses(["shutil.rmtree"]).check(config)
    AllowedClasses().check({"x": read_recipe, "y": "text", "z": 1})


def test_a_class_of_ones_own_is_announced_before_it_is_imported(own: Path, recipe: str) -> None:
    with pytest.warns(UserWarning, match="builds own_project.Watch, whose code runs with all"):
        plan(own, callback("own_project.Watch"))
    (own / "imported").unlink()
    sys.modules.pop("own_project")
    with pytest.raises(UserWarning, match=r"own_project\.Watch"):
        plan(own, callback("own_project.Watch"))  # a warning is an error in tests
    assert not (own / "imported").exists()


@pytest.mark.parametrize("named", ["own_project", "own_project.Model", "other, own_project"])
def test_a_class_of_ones_own_can_be_named(own: Path, recipe: str, named: str) -> None:
    cli = PrivacyCLI(
        ["fit", "--config", recipe, "--model.class_path=own_project.Model", OPTION, named]
    )
    assert type(cli.model).__name__ == "Model"


OPTION = "--allow_classes"


def test_a_recipe_cannot_name_it_for_the_user(own: Path, recipe: str) -> None:
    with pytest.warns(UserWarning, match="own_project"), pytest.raises(SystemExit):
        plan(own, f"allow_classes: own_project\n{callback('own_project.Watch')}")


@pytest.mark.parametrize(
    ("words", "own_names"),
    [
        (["fit", OPTION, "a,b.C"], ["a", "b.C"]),
        (["fit", f"{OPTION}=a", OPTION, "b"], ["a", "b"]),
        (["fit", OPTION], []),
    ],
)
def test_the_option(words: list[str], own_names: list[str]) -> None:
    assert without_option(words) == (["fit"], own_names)


def test_every_recipe_of_the_repository_is_built_without_a_word() -> None:
    root = Path(__file__).parents[2]
    for path in sorted((root / "recipes").rglob("*.yaml")):
        AllowedClasses().read(["--config", str(path)])
