"""What holds for every metric: ranks add up, a twin agrees, it plots, resets and moves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_privacy.metrics import (
    EpsilonLowerBound,
    Exposure,
    ExtractionRate,
    MechanismEpsilonLowerBound,
    MembershipAdvantage,
    MembershipAUROC,
    PrivacyLeakage,
    TPRAtFPR,
    UserInferenceAUROC,
)
from lightning_privacy.metrics import functional as twins

COUNT = 120
CURVE = twins.GaussianProfile(noise_multiplier=0.5)


def inputs(kind: str) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(3)
    member = torch.rand(COUNT, generator=draw) < 0.5
    scores = torch.randn(COUNT, generator=draw, dtype=torch.float64) + 2 * member
    if kind == "user":
        user = torch.arange(COUNT) // 4
        return scores, user, member[user * 4]
    if kind == "table":
        return torch.randn(COUNT, 20, generator=draw), torch.arange(COUNT) % 20
    if kind == "tokens":
        return torch.randn(COUNT, 1, 3, generator=draw), torch.arange(COUNT)[:, None] % 3
    return scores, member


CASES: dict[str, tuple[Callable[[], Metric], str, Callable[..., Any]]] = {
    "auroc": (MembershipAUROC, "scores", twins.membership_auroc),
    "tpr": (lambda: TPRAtFPR(0.1), "scores", lambda *a: twins.tpr_at_fpr(*a, 0.1)),
    "advantage": (
        MembershipAdvantage,
        "scores",
        lambda *a: twins.membership_advantage(*a)._asdict(),
    ),
    "leakage": (
        PrivacyLeakage,
        "scores",
        lambda *a: {
            **twins.membership_advantage(*a)._asdict(),
            "tpr_at_1_percent_fpr": twins.tpr_at_fpr(*a, 0.01),
        },
    ),
    "epsilon": (
        lambda: EpsilonLowerBound(1e-5, "one_run"),
        "scores",
        lambda *a: twins.epsilon_lower_bound(*a, delta=1e-5, method="one_run"),
    ),
    "mechanism": (
        lambda: MechanismEpsilonLowerBound(1e-5, CURVE),
        "scores",
        lambda *a: twins.mechanism_epsilon_lower_bound(*a, CURVE, delta=1e-5),
    ),
    "user": (UserInferenceAUROC, "user", twins.user_inference_auroc),
    "exposure": (Exposure, "table", lambda *a: twins.exposure(*a).mean()),
    "extraction": (
        ExtractionRate,
        "tokens",
        lambda *a: twins.greedily_extracted(*a).double().mean(),
    ),
}


def flat(value: Any) -> list[float]:
    return [float(v) for v in (value.values() if isinstance(value, dict) else [value])]


@pytest.mark.parametrize("name", CASES)
def test_a_metric_is_its_twin_over_all_batches(name: str) -> None:
    make, kind, twin = CASES[name]
    whole, metric = inputs(kind), make()
    for start in range(0, COUNT, 17):
        metric.update(*(part[start : start + 17] for part in whole))
    assert flat(metric.compute()) == pytest.approx(flat(twin(*whole)), rel=1e-6)
    metric.reset()
    metric.update(*whole)
    assert flat(metric.compute()) == pytest.approx(flat(twin(*whole)), rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_metric_plots(name: str) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    make, kind, _ = CASES[name]
    metric = make()
    metric.update(*inputs(kind))
    figure, axes = metric.plot()
    assert axes.get_figure() is figure
    metric.plot([metric.compute(), metric.compute()], ax=axes)
    plt.close(figure)


@pytest.mark.parametrize("name", CASES)
def test_the_states_of_two_ranks_add_up(name: str) -> None:
    make, kind, twin = CASES[name]
    whole, first, second = inputs(kind), make(), make()
    first.update(*(part[:40] for part in whole))
    second.update(*(part[40:] for part in whole))
    second.merge_state(first)
    assert flat(second.compute()) == pytest.approx(flat(twin(*whole)), rel=1e-6)


WORKER = """
import sys, torch
from datetime import timedelta
from tests.metrics.test_metric_contract import CASES, COUNT, flat, inputs
rank, file = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
for name, (make, kind, twin) in CASES.items():
    whole, metric = inputs(kind), make()
    cut = COUNT // 3 if kind != "user" else 40
    metric.update(*(part[:cut] if rank == 0 else part[cut:] for part in whole))
    found, expected = flat(metric.compute()), flat(twin(*whole))
    assert all(abs(a - b) < 1e-5 for a, b in zip(found, expected, strict=True)), (name, found)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Any) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "meet")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
