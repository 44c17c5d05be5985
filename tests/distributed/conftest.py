from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.worlds import Processes


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Two ranks on the CPU, started once."""
    found = Processes()
    yield found
    found.stop()
