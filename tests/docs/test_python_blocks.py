"""Every Python block of the documentation runs, in the order of its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, blocks

WITH_PYTHON = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]


# What the pages are about, and say.
EXPECTED = (
    # Resuming.
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:.* private steps since the checkpoint are charged",
    "ignore:The budget allows .* more private steps",
    # What the page on Llama-7B does with peft alone, with newer versions of transformers.
    "ignore:.is_gradient_checkpointing. is deprecated",
)


@pytest.mark.filterwarnings(*EXPECTED)
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python":
            # Blank lines in front, so that a traceback shows the line of the page.
            source = "\n" * (block.line - 1) + block.content
            exec(compile(source, str(page), "exec"), namespace)


def test_there_are_pages_with_python() -> None:
    assert WITH_PYTHON
