"""Every command of the documentation is one that exists, with options that exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from importlib import import_module
from itertools import pairwise

import pytest

from tests.docs.pages import PAGES, ROOT, Block, all_blocks, blocks

LANGUAGES = {"python", "shell", "yaml", "text", "toml", "mermaid"}
# Commands of other programs, as they stand.
OTHERS = {". .venv/bin/activate", "pip install pre-commit", "pre-commit install"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(block: Block) -> list[str]:
    joined = block.content.replace("\\\n", " ")
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip()]


COMMANDS = sorted({line for block in all_blocks("shell") for line in commands(block)})

# A plan, with what it prints in the block that follows.
PLANS = {
    shell: shown
    for page in PAGES
    for shell, shown in pairwise(blocks(page))
    if shell.content.startswith("lightning-privacy plan") and shown.language == "text"
}


def check_own_command(arguments: list[str]) -> None:
    from lightning_privacy.cli import main

    if arguments[0] in {"audit", "ledger", "report"}:
        module = import_module(f"lightning_privacy.cli.{arguments[0]}")
        module.parsed(arguments[1:])  # the file is the reader's
        return
    if arguments[0] in {"compare", "ablate"}:
        from lightning_privacy.cli.compare import planned

        assert planned(arguments[0], arguments[1:])
        return
    if arguments[0] == "fit":
        arguments = [*arguments, "--print_config"]
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code in {None, 0}


def check(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        assert set(arguments) <= TARGETS, f"the Makefile has no target {arguments}"
    elif program == "pip" and line not in OTHERS:
        extras = re.search(r"\[(.*)\]", line)
        assert set(extras[1].split(",") if extras else []) <= EXTRAS.keys()
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    elif program == "lightning-privacy":
        check_own_command(arguments)
    elif program in {"torchrun", "srun"}:
        started = next(n for n, word in enumerate(arguments) if "privacy" in word)
        check_own_command(arguments[started + 1 :])
    else:
        assert line in OTHERS, f"nothing checks this command: {line}"


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_exists(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(line)


@pytest.mark.parametrize("shell", PLANS, ids=str)
def test_a_plan_prints_what_the_page_shows(
    shell: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    (line,) = commands(shell)
    check(line)
    printed = [row.rstrip() for row in capsys.readouterr().out.splitlines()]
    assert printed == PLANS[shell].content.splitlines()


@pytest.mark.parametrize("line", ["make tea", "pip install .[nothing]", "python no.py", "rm -rf ."])
def test_the_check_can_fail(line: str) -> None:
    with pytest.raises(AssertionError):
        check(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_its_language(page: object) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES  # type: ignore[arg-type]
