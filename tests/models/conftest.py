from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    """The folder of a small Llama with its tokeniser."""
    from tests.models.checkpoints import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("llama"))
