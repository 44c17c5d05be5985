"""`private_ddp`: two ranks do what one process does, with one noise, and fail as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.callbacks.training import LIGHTNING_NOISE
from tests.distributed import jobs
from tests.distributed.worlds import Processes

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]
pytestmark += [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def apart(first: jobs.Weights, second: jobs.Weights) -> float:
    assert first.keys() == second.keys()
    pairs = ((np.array(first[name]), np.array(second[name])) for name in first)  # in float64
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def require_equal(job, processes: Processes, folder: Path, *arguments) -> None:
    one = job(str(folder), 1, *arguments)
    first, second = processes.run(job, str(folder), 2, *arguments)
    assert first == second
    assert 0 <= apart(first, one) <= 1e-12


# ------------------------------------------------------------------ without noise
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"clipping": "per_layer"}, marks=pytest.mark.slow),
        pytest.param({"clipping": "automatic"}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_do_what_one_does(processes, tmp_path, settings) -> None:
    require_equal(jobs.weights_after, processes, tmp_path, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"user_sampling": "examples", "group_size": 3}, marks=pytest.mark.slow),
        pytest.param(
            {"user_update": "local_steps", "local_learning_rate": 0.1}, marks=pytest.mark.slow
        ),
    ],
)
def test_two_ranks_do_what_one_does_for_users(processes, tmp_path, settings) -> None:
    require_equal(jobs.of_users, processes, tmp_path, settings)


def test_two_ranks_clip_by_tier(processes, tmp_path) -> None:
    require_equal(jobs.of_tiers, processes, tmp_path)


@pytest.mark.slow
def test_two_ranks_step_by_hand(processes, tmp_path) -> None:
    require_equal(jobs.by_hand, processes, tmp_path)


def test_ranks_without_examples_take_part(processes, tmp_path) -> None:
    one = jobs.small_draws(str(tmp_path), 1)
    both = processes.run(jobs.small_draws, str(tmp_path), 2)
    assert both[0]["weights"] == both[1]["weights"]
    assert apart(both[0]["weights"], one["weights"]) <= 1e-12
    # As many passes on each, or whoever logs over ranks would wait forever.
    assert both[0]["calls"] == both[1]["calls"]


# ------------------------------------------------------------------ with noise
def variance_is(values: list[float], expected: float) -> bool:
    """The chi-square test on the second moment, at a level of about 1e-6."""
    statistic = float(np.square(values).sum()) / expected
    return 5e-7 < stats.chi2.cdf(statistic, len(values)) < 1 - 5e-7


def test_the_world_has_one_noise(processes, tmp_path) -> None:
    first, second = processes.run(jobs.noise, str(tmp_path), 2, 1, {})
    assert first["world"] == second["world"]
    assert variance_is(first["world"], 1.0)
    assert not variance_is(first["world"], 2.0)
    assert not variance_is(first["world"], 0.5)
    assert stats.kstest(first["world"], "norm").pvalue > 1e-6
    # Half of it comes from each rank, and neither knows the other's half.
    for rank in (first, second):
        assert variance_is(rank["share"], 0.5)
    together = np.add(first["share"], second["share"])
    order = np.argsort(together), np.argsort(np.negative(first["world"]))
    np.testing.assert_allclose(together[order[0]], np.negative(first["world"])[order[1]], atol=1e-5)
    assert abs(np.corrcoef(first["share"], second["share"])[0, 1]) < 0.05
    assert first["noise_secret"] != second["noise_secret"]
    assert first["secret"] == second["secret"] != first["noise_secret"]
    assert first["epsilon"] == second["epsilon"] > 0


def test_the_world_has_one_noise_on_a_grid(processes, tmp_path) -> None:
    first, second = processes.run(jobs.noise, str(tmp_path), 2, 1, {"secure_rounding": True})
    assert first["world"] == second["world"]
    assert variance_is(first["world"], 1.0)
    for rank in (first, second):
        assert variance_is(rank["share"], 0.5)
        assert rank["on_grid"]


def test_sums_on_a_grid_are_those_of_one_process(processes, tmp_path) -> None:
    """Rounding moves them by far less than the noise, which is too small here to be seen."""
    settings = {"secure_rounding": True, "noise_multiplier": 1e-4}
    one = jobs.weights_after(str(tmp_path), 1, settings)
    first, second = processes.run(jobs.weights_after, str(tmp_path), 2, settings)
    assert first == second
    assert 0 < apart(first, one) <= 1e-3


@pytest.mark.slow
def test_noise_differs_from_step_to_step_and_in_test_mode_by_rank(processes, tmp_path) -> None:
    first, second = processes.run(jobs.noise, str(tmp_path), 2, 3, {"test_seed": 5})
    assert variance_is(first["world"], 3.0)
    assert variance_is(first["share"], 0.5)
    assert first["share"] != second["share"]
    assert processes.run(jobs.noise, str(tmp_path), 2, 3, {"test_seed": 5})[0] == first


# ------------------------------------------------------------------ what is shown
def test_figures_are_those_of_one_process(processes, tmp_path) -> None:
    one = jobs.logged(str(tmp_path), 1)
    first, second = processes.run(jobs.logged, str(tmp_path), 2)
    # Replicas are equal although they began with different weights, and nothing wraps them.
    assert first["weights"] == second["weights"]
    assert first["model"] == "Weighed"
    for rank in (first, second):
        for name in ("privacy/clipped_share", "privacy/mean_norm", "share", "steps"):
            assert rank[name] == pytest.approx(one[name], rel=0.02), name
        # Lightning takes the mean of the ranks' numbers of rows as a whole number.
        assert rank["loss"] == pytest.approx(one["loss"], rel=0.05)
        # The sum itself never exists without noise; it is estimated.
        assert rank["privacy/noise_to_signal"] == pytest.approx(
            one["privacy/noise_to_signal"], rel=0.05
        )


# ------------------------------------------------------------------ failures
@pytest.mark.parametrize("way", ["error", "leak", "hook"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_on_one_rank_ends_all(processes, tmp_path, rank, way) -> None:
    found = processes.run(jobs.error_of, str(tmp_path), rank, 2, way)
    kinds = [kind for kind, _, _ in found]
    assert {step for _, _, step in found} == {2}
    if way == "leak":
        assert found[0] == found[1]
        assert kinds == ["UnsupportedOperationError"] * 2
        return
    assert kinds[rank] == "OSError"
    assert kinds[1 - rank] == "GuaranteeError"
    assert f"rank {rank}: OSError: no such" in found[1 - rank][1]


def test_every_rank_holds_the_whole_data_set(processes, tmp_path) -> None:
    first, second = processes.run(jobs.data_of_two_lengths, str(tmp_path))
    assert first == second
    assert "rows of the data set 40, 39" in first


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gathering", "c10d"),
        ("different", "differences in base"),
        ("frozen", "differences in net.0.bias"),
    ],
)
def test_refusals(processes, tmp_path, kind, words) -> None:
    first, second = processes.run(jobs.refusal, str(tmp_path), kind)
    assert first == second
    assert words in first


def test_processes_may_train_models_of_their_own(processes, tmp_path) -> None:
    assert processes.run(jobs.apart, str(tmp_path)) == [True, True]


# ------------------------------------------------------------------ resumes
def test_a_run_goes_on_with_as_many_ranks_or_fewer_or_more(processes, tmp_path) -> None:
    folder, settings = str(tmp_path), {"test_seed": None, "noise_multiplier": 0.5}
    first, second = processes.run(jobs.resumed, folder, 2, None, settings, 4)
    assert first["journals"] == second["journals"] == [f"privacy-journal-{first['run']}.jsonl"]
    assert first["run"] == second["run"]
    assert [first["journal"], second["journal"]] == [True, False]
    # Two steps were made after this checkpoint: they stay charged, on every rank.
    path = str(tmp_path / "step=2.ckpt")
    third, fourth = processes.run(jobs.resumed, folder, 2, path, settings, 6)
    assert third["steps"] == fourth["steps"] == 8
    assert third["weights"] == fourth["weights"] != first["weights"]
    assert third["cursor"] == fourth["cursor"] == 8
    with pytest.warns(UserWarning, match="private steps since the checkpoint are charged"):
        alone = jobs.resumed(folder, 1, path, settings, 6)
    assert alone["steps"] == 12
    path = str(tmp_path / "step=6.ckpt")
    fifth, sixth = processes.run(jobs.resumed, folder, 2, path, settings, 8)
    assert fifth["steps"] == sixth["steps"] == 14
    assert fifth["epsilon"] > third["epsilon"]


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_in_one_as_if_unbroken(processes, tmp_path) -> None:
    whole = processes.run(jobs.resumed, str(tmp_path / "a"), 2, None, {}, 4)[0]
    alone = jobs.resumed(str(tmp_path / "b"), 1, str(tmp_path / "a" / "step=2.ckpt"), {}, 4)
    assert apart(alone["weights"], whole["weights"]) <= 1e-12


def test_one_process_keeps_the_books(processes, tmp_path) -> None:
    first, second = processes.run(jobs.with_ledger, str(tmp_path))
    assert first["weights"] == second["weights"]
    assert first["entries"] == second["entries"] == [(first["run"], 10)]
    assert first["steps"] == second["steps"] == 10
    assert [first["reserved"], second["reserved"]] == [1, 0]
    # Each rank validates its part; the module did not ask for a mean over ranks.
    assert first["shown"] == pytest.approx(first["loss"])
    assert len(list(tmp_path.glob("*.jsonl"))) == 1


@pytest.mark.slow
def test_a_logical_batch_that_follows_from_the_ranks_is_another_mechanism(
    processes, tmp_path
) -> None:
    settings = {"expected_batch_size": None}
    jobs.resumed(str(tmp_path), 1, None, settings, 4)
    found = processes.run(jobs.other_default, str(tmp_path), str(tmp_path / "step=2.ckpt"))
    assert found[0] == found[1]
    assert "expected_batch_size 3.0 there, 6.0 here" in found[0]
