"""What every test may rely on, and what no test may leave behind."""

from __future__ import annotations

import datetime
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent

# No test reaches a network, draws on a screen, or forks a tokenizer's threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test reads what another run has remembered, or leaves something to be remembered.
os.environ["LIGHTNING_PRIVACY_CACHE"] = "off"
_STATE = tempfile.TemporaryDirectory(prefix="lightning-privacy-")
os.environ["LIGHTNING_PRIVACY_STATE"] = _STATE.name
# By which some tests rotate: the same in all processes that share the suite, around midnight, too.
TODAY = datetime.datetime.now(datetime.UTC).date().toordinal()
os.environ.setdefault("LIGHTNING_PRIVACY_TESTS_DAY", str(TODAY))
# Where several processes share the suite, each has one core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Other packages set these for the whole process when they are first imported or used.
SET_BY_OTHERS = frozenset(
    {
        "CUBLAS_WORKSPACE_CONFIG",
        "CUDA_DEVICE_ORDER",
        "KMP_DUPLICATE_LIB_OK",
        "KMP_INIT_AT_FORK",
        "PYTEST_CURRENT_TEST",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "TRITON_CACHE_DIR",
        "TRITON_PTXAS_PATH",
    }
)
CACHES = frozenset({
    ".hypothesis", ".import_linter_cache", ".mypy_cache", ".pytest_cache", ".ruff_cache",
    "__pycache__",
})  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin each test, and the fixtures that it makes, with the same global random numbers.

    Which tests went before in a process depends on how several share the suite. What the package
    keeps secret comes from the operating system, and stays random.
    """
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves the process or the repository other than it found them.

    Watched are the environment, the working directory, the files in the repository's root, and
    torch's default dtype, number of threads, gradient mode and determinism.
    """
    environment, directory, files = dict(os.environ), Path.cwd(), _files()
    torch_before = _torch_state()
    yield
    torch_after = _torch_state()
    leftovers = _files() - files
    changed = _changed(environment)
    moved = Path.cwd() != directory
    for name in changed:
        os.environ.pop(name, None)
    os.environ.update({name: environment[name] for name in changed & environment.keys()})
    os.chdir(directory)
    assert not changed, f"the test changed the environment: {sorted(changed)}"
    assert not moved, f"the test changed the working directory from {directory}"
    assert not leftovers, f"the test left files in the repository: {sorted(leftovers)}"
    if torch_before is not None:
        assert torch_after == torch_before, "the test changed torch's settings"


def _changed(before: dict[str, str]) -> set[str]:
    names = before.keys() | os.environ.keys()
    return {name for name in names if before.get(name) != os.environ.get(name)} - SET_BY_OTHERS


def _files() -> set[str]:
    return {path.name for path in ROOT.iterdir()} - CACHES


def _torch_state() -> tuple[object, ...] | None:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "are_deterministic_algorithms_enabled"):
        return None
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )
