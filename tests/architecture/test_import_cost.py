"""``import lightning_privacy`` is free: heavy packages load when something needs them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = frozenset({
    "bitsandbytes", "datasets", "dp_accounting", "jsonargparse", "lightning", "matplotlib",
    "numpy", "opacus", "peft", "rich", "scipy", "torch", "torchmetrics", "transformers",
})  # fmt: skip
IMPORT = """
import json, sys, time
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def imported(module: str) -> tuple[float, set[str]]:
    command = [sys.executable, "-c", IMPORT.format(module=module)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    seconds, names = json.loads(output.stdout)
    return seconds, set(names)


def test_importing_the_package_costs_less_than_a_tenth_of_a_second() -> None:
    # Other processes may slow some tries, and a heavy import slows all.
    assert any(imported("lightning_privacy")[0] < 0.1 for _ in range(20))


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert imported("lightning_privacy")[1] & HEAVY == set()


@pytest.mark.parametrize("module", ["errors", "types"])
def test_the_bottom_layers_load_nothing_heavy(module: str) -> None:
    assert imported(f"lightning_privacy.{module}")[1] & HEAVY == set()


def test_accounting_loads_neither_torch_nor_the_accountants() -> None:
    assert imported("lightning_privacy.accounting")[1] & HEAVY <= {"numpy", "scipy"}


def test_the_mathematics_loads_torch_at_most() -> None:
    layers = ("clipping", "noise", "plan", "sampling", "step")
    heavy = imported(", ".join(f"lightning_privacy.{layer}" for layer in layers))[1] & HEAVY
    assert heavy <= {"numpy", "scipy", "torch"}


def test_the_check_can_fail() -> None:
    assert "numpy" in imported("numpy")[1]
