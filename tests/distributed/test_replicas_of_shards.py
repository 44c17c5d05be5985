"""`PrivateFSDPStrategy(replicas=...)`: shards that several ranks hold do what one process does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.callbacks.training import LIGHTNING_NOISE
from tests.distributed import replica_jobs as replicated
from tests.distributed import sharded_jobs as sharded
from tests.distributed.test_ddp import apart, variance_is
from tests.distributed.worlds import Processes

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE]


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    found = Processes(4)
    yield found
    found.stop()


# ------------------------------------------------------------------ two replicas of one shard
def test_two_replicas_do_what_one_process_does(processes, tmp_path) -> None:
    one = sharded.weights_after(str(tmp_path), 1, "blocks", {})
    first, second = processes.run(replicated.weights_after, str(tmp_path), 2, 2, "blocks", {})
    assert first == second
    assert apart(first, one) <= 1e-12


def test_each_replica_draws_a_share_of_the_noise(processes, tmp_path) -> None:
    first, second = processes.run(replicated.noise, str(tmp_path), 2, 2, {})
    assert first["world"] == second["world"]
    assert variance_is(first["world"], 1.0)
    for rank in (first, second):
        assert variance_is(rank["own"], 0.5)
    shares = np.array([first["own"], second["own"]])
    assert abs(np.corrcoef(shares)[0, 1]) < 5 / shares.shape[1] ** 0.5  # five deviations
    # The sum without noise is nowhere: its norm is estimated.
    assert first["ratio"] == second["ratio"] > 5


def test_replicas_begin_with_the_weights_of_the_first(processes, tmp_path) -> None:
    first, second = processes.run(replicated.from_other_weights, str(tmp_path), 2, 2)
    assert first == second


@pytest.mark.parametrize(
    ("replicas", "words"),
    [(3, "replicas=3 on 2 ranks"), (0, "`replicas` must be"), (1.5, "`replicas` must be")],
)
def test_replicas_divide_the_ranks(processes, tmp_path, replicas, words) -> None:
    first, second = processes.run(replicated.refusal, str(tmp_path), 2, replicas)
    assert first == second
    assert first.startswith("ConfigurationError")
    assert words in first


# ------------------------------------------------------------------ two replicas of two shards
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [("blocks", {}), ("small", {"expected_batch_size": 1}), ("blocks", {"clipping": "per_layer"})],
)
def test_four_ranks_do_what_one_process_does(four, tmp_path, name, settings) -> None:
    one = sharded.weights_after(str(tmp_path), 1, name, settings)
    found = four.run(replicated.weights_after, str(tmp_path), 4, 2, name, settings)
    assert all(weights == found[0] for weights in found)
    assert apart(found[0], one) <= 1e-12


@pytest.mark.slow
def test_four_ranks_do_what_one_process_does_for_users(four, tmp_path) -> None:
    found = four.run(replicated.of_users, str(tmp_path), 4, 2)
    assert all(weights == found[0] for weights in found)
    settings = {"unit": "user", "group_size": 9, "users": sharded.jobs.USERS}
    settings["expected_batch_size"] = 6
    one = sharded.weights_after(str(tmp_path), 1, "blocks", settings)
    assert apart(found[0], one) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"secure_rounding": True}])
def test_four_ranks_have_one_noise(four, tmp_path, settings) -> None:
    found = four.run(replicated.noise, str(tmp_path), 4, 2, settings)
    assert all(rank["world"] == found[0]["world"] for rank in found)
    assert variance_is(found[0]["world"], 1.0)
    assert all(variance_is(rank["own"], 0.5) for rank in found)
    # Ranks 0 and 1 hold the two shards, 2 and 3 hold them again.
    assert len(found[0]["own"]) == len(found[2]["own"])
    assert len(found[0]["own"]) + len(found[1]["own"]) == len(found[0]["world"])


@pytest.mark.slow
def test_a_folder_of_replicated_shards_goes_on_with_other_ranks(four, processes, tmp_path) -> None:
    unbroken = four.run(replicated.resumed, str(tmp_path / "a"), 4, 2, None, 4, True)[0]
    path = str(tmp_path / "a" / "step=2.ckpt")
    again = four.run(replicated.resumed, str(tmp_path / "b"), 4, 2, path, 4, True)[0]
    assert again == unbroken
    fewer = processes.run(replicated.resumed, str(tmp_path / "c"), 2, 1, path, 4, True)[0]
    assert fewer["steps"] == 4
    assert apart(fewer["weights"], unbroken["weights"]) <= 1e-12
