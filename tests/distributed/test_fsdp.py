"""`private_fsdp`: sharded parameters, sums and noise do what one process does."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from torch.distributed.checkpoint import FileSystemReader

from tests.callbacks.training import LIGHTNING_NOISE
from tests.distributed import jobs
from tests.distributed import sharded_jobs as sharded
from tests.distributed.test_ddp import apart, variance_is
from tests.distributed.worlds import Processes

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    # PEFT's and ours, with newer versions of transformers.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing"),
]


def require_equal(job, processes, folder, *arguments) -> None:
    one = job(str(folder), 1, *arguments)
    first, second = processes.run(job, str(folder), 2, *arguments)
    assert first == second
    assert apart(first, one) <= 1e-12


# ------------------------------------------------------------------ without noise
@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("blocks", {}),
        pytest.param("small", {}, marks=pytest.mark.slow),
        pytest.param("blocks", {"clipping": "per_layer"}, marks=pytest.mark.slow),
        pytest.param("blocks", {"clipping": "automatic"}, marks=pytest.mark.slow),
        pytest.param("manual", {}, marks=pytest.mark.slow),
        ("small", {"expected_batch_size": 1}),
    ],
)
def test_shards_do_what_one_process_does(processes, tmp_path, module, settings) -> None:
    require_equal(sharded.weights_after, processes, tmp_path, module, settings)


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"user_sampling": "examples", "group_size": 3}, marks=pytest.mark.slow)],
)
def test_shards_do_what_one_process_does_for_users(processes, tmp_path, settings) -> None:
    require_equal(sharded.of_users, processes, tmp_path, settings)


@pytest.mark.slow
def test_a_module_is_trained_twice(processes, tmp_path) -> None:
    require_equal(sharded.twice, processes, tmp_path)


def test_shards_in_mixed_precision(processes, tmp_path) -> None:
    one = sharded.in_mixed_precision(str(tmp_path), 1)
    first, second = processes.run(sharded.in_mixed_precision, str(tmp_path), 2)
    assert first == second
    assert 0 < apart(first, one) < 1e-2


def test_nothing_unclipped_is_added_up(processes, tmp_path) -> None:
    found = processes.run(sharded.raw_sums, str(tmp_path))[0]
    assert found["raw"] == 0
    assert len(found["sharded"]) == 16
    assert found["types"] == ["DTensor"]


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "tied"), [(False, True), (False, False), (True, False)])
def test_a_small_llama(processes, tmp_path, lora, tied) -> None:
    pytest.importorskip("peft")
    one = sharded.llama(str(tmp_path), 1, lora, tied)
    first, second = processes.run(sharded.llama, str(tmp_path), 2, lora, tied)
    assert first == second
    # Its norms compute in float32.
    assert apart(first["weights"], one["weights"]) <= 1e-5
    assert first["sharded"] == len(one["weights"])


@pytest.mark.slow
def test_validation_comes_between(processes, tmp_path) -> None:
    require_equal(sharded.with_validation, processes, tmp_path)


@pytest.mark.parametrize("twice", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_base_in_four_bits_is_sharded_bit_by_bit(processes, tmp_path, twice) -> None:
    pytest.importorskip("bitsandbytes")
    one = sharded.quantised(str(tmp_path), 1, twice)
    first, second = processes.run(sharded.quantised, str(tmp_path), 2, twice)
    assert first == second
    assert set(first["sharded"]) == {
        "net.0.weight", "net.0.bias", "net.1.weight", "net.2.weight", "net.2.bias"
    }  # fmt: skip
    assert first["values"] == one["values"]
    assert apart(first["weights"], one["weights"]) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_lora_over_a_sharded_base_in_four_bits(processes, tmp_path, task) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    one = sharded.qlora(str(tmp_path / "one"), 1, None, task)
    folder = str(tmp_path / "two")
    first, second = processes.run(sharded.qlora, folder, 2, None, task)
    assert first["weights"] == second["weights"]
    # AdamW divides by gradients that are rounded in float32.
    assert apart(first["weights"], one["weights"]) <= 1e-5
    # Each validates its half of the rows.
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(one["loss"], rel=1e-5)
    # Each rank has half of the base, with everything that belongs to it.
    assert first["whole"] == []
    assert one["bytes"] >= 2 * (4 * 64 * 64 + 3 * 64 * 128) // 2
    for rank in (first, second):
        assert 0.49 < rank["bytes"] / one["bytes"] < 0.52
    # The adapters go on in one process, and back.
    path = str(tmp_path / "two" / "step=2.ckpt")
    alone = sharded.qlora(str(tmp_path / "alone"), 1, path, task)
    assert apart(alone["weights"], one["weights"]) <= 1e-5
    path = str(tmp_path / "one" / "step=2.ckpt")
    again = processes.run(sharded.qlora, folder, 2, path, task)[0]
    assert again["steps"] == 4
    assert apart(again["weights"], one["weights"]) <= 1e-5


@pytest.mark.slow
def test_a_folder_of_adapters_goes_on(processes, tmp_path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    task = "causal_lm"
    unbroken = processes.run(sharded.qlora, str(tmp_path / "a"), 2, None, task, True)[0]
    path = tmp_path / "a" / "step=2.ckpt"
    # The frozen base is not in it.
    names = FileSystemReader(path).read_metadata().state_dict_metadata
    weights = [name for name in names if name.startswith("state_dict")]
    assert weights
    assert all("lora" in name for name in weights)
    again = processes.run(sharded.qlora, str(tmp_path / "b"), 2, str(path), task, True)[0]
    assert apart(again["weights"], unbroken["weights"]) <= 1e-6


# ------------------------------------------------------------------ with noise
def test_each_rank_draws_the_noise_of_its_shard(processes, tmp_path) -> None:
    first, second = processes.run(sharded.noise, str(tmp_path), 1, {})
    assert first["world"] == second["world"]
    assert variance_is(first["world"], 1.0)
    assert stats.kstest(first["world"], "norm").pvalue > 1e-6
    for rank in (first, second):
        assert variance_is(rank["share"], 1.0)
    assert sorted(first["share"] + second["share"]) == sorted(first["world"])
    length = min(len(first["share"]), len(second["share"]))
    together = np.corrcoef(first["share"][:length], second["share"][:length])[0, 1]
    assert abs(together) < 0.06
    assert first["ratio"] == second["ratio"] == 1e9  # there is no signal


@pytest.mark.slow
def test_each_rank_rounds_its_shard(processes, tmp_path) -> None:
    first, second = processes.run(sharded.noise, str(tmp_path), 1, {"secure_rounding": True})
    assert first["world"] == second["world"]
    assert variance_is(first["world"], 1.0)
    assert first["on_grid"]
    assert second["on_grid"]


@pytest.mark.slow
def test_noise_of_several_steps_and_in_test_mode(processes, tmp_path) -> None:
    first, second = processes.run(sharded.noise, str(tmp_path), 3, {"test_seed": 5})
    assert variance_is(first["world"], 3.0)
    # A few of so many float32 numbers are equal by chance.
    assert len(set(first["share"]) & set(second["share"])) < 0.02 * len(first["share"])
    assert processes.run(sharded.noise, str(tmp_path), 3, {"test_seed": 5})[0] == first


# ------------------------------------------------------------------ checkpoints
@pytest.mark.slow
def test_one_file_goes_from_two_ranks_to_one_and_back(processes, tmp_path) -> None:
    folder = str(tmp_path / "two")
    unbroken = processes.run(sharded.resumed, folder, 2, None, 4, {}, False)[0]
    path = str(tmp_path / "two" / "step=2.ckpt")
    alone = sharded.resumed(str(tmp_path / "one"), 1, path, 4, {}, False)
    assert apart(alone["weights"], unbroken["weights"]) <= 1e-12
    path = str(tmp_path / "one" / "step=4.ckpt")
    further = processes.run(sharded.resumed, folder, 2, path, 6, {}, False)[0]
    assert further["steps"] == 6
    again = sharded.resumed(str(tmp_path / "three"), 1, path, 6, {}, False)
    assert apart(again["weights"], further["weights"]) <= 1e-12


def test_a_folder_of_shards_goes_on_with_its_budget(processes, tmp_path) -> None:
    folder, settings = str(tmp_path), {"test_seed": None, "noise_multiplier": 0.5}
    first, _ = processes.run(sharded.resumed, folder, 2, None, 4, settings, True)
    path = tmp_path / "step=2.ckpt"
    assert path.is_dir()
    third, fourth = processes.run(sharded.resumed, folder, 2, str(path), 6, settings, True)
    assert third["steps"] == fourth["steps"] == 8
    assert third["run"] == fourth["run"] == first["run"]


@pytest.mark.slow
def test_a_folder_of_shards_goes_on_in_one_process(processes, tmp_path) -> None:
    folder = str(tmp_path / "two")
    unbroken = processes.run(sharded.resumed, folder, 2, None, 4, {}, True)[0]
    path = str(tmp_path / "two" / "step=2.ckpt")
    alone = Processes(1)
    try:
        (found,) = alone.run(sharded.resumed, str(tmp_path / "one"), 1, path, 4, {}, True, True)
        (again,) = alone.run(sharded.resumed, str(tmp_path / "file"), 1, path, 3, {}, False, True)
    finally:
        alone.stop()
    assert apart(found["weights"], unbroken["weights"]) <= 1e-12
    assert found["steps"] == 4
    # There it can become one file, with which any strategy goes on.
    whole = sharded.resumed(
        str(tmp_path / "any"), 1, str(tmp_path / "file" / "last.ckpt"), 4, {}, False
    )
    assert apart(whole["weights"], unbroken["weights"]) <= 1e-12
    assert again["steps"] == 3


# ------------------------------------------------------------------ failures
@pytest.mark.parametrize(
    ("way", "words"), [("forward", "rank 1: OSError: no such record"), ("stop", "rank 1 is silent")]
)
def test_a_rank_that_waits_in_vain_ends(tmp_path, capfd, way, words) -> None:
    own = Processes()
    try:
        own.start(sharded.waits_in_vain, str(tmp_path), way)
        assert own.ended(0) == 1
        if way == "forward":
            assert own.answer(1) == "OSError: no such record"
    finally:
        own.stop()
    assert f"A rank of this private fit has failed ({words})" in capfd.readouterr().err


# ------------------------------------------------------------------ one's own way, and refusals
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["private_fsdp", "model_parallel"])
def test_a_module_may_shard_itself(processes, tmp_path, strategy) -> None:
    first, second = processes.run(sharded.by_itself, str(tmp_path), strategy)
    assert first == second
    one = sharded.weights_after(str(tmp_path), 1, "blocks", {})
    assert apart(first["weights"], one) <= (1e-12 if strategy == "private_fsdp" else 1e-6)
    assert first["name"].startswith("Private")


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("own", {}, "shift of the LightningModule itself"),
        ("two", {}, "on a mesh of shape (2, 1)"),
        ("partly", {}, "net.head.weight, which is whole on every rank"),
        ("gathering", {}, "c10d.allgather"),
        ("like parameters", {}, "c10d._allgather_base_"),
        (
            "blocks",
            {
                "unit": "user",
                "group_size": 9,
                "users": jobs.USERS,
                "user_update": "local_steps",
                "local_learning_rate": 0.1,
            },
            "local_steps",
        ),
    ],
)
def test_refusals(processes, tmp_path, name, settings, words) -> None:
    first, second = processes.run(sharded.refusal, str(tmp_path), name, settings)
    assert first == second
    assert words in first


@pytest.mark.slow
def test_figures_are_those_of_one_process(processes, tmp_path) -> None:
    settings = {"noise_multiplier": 1e-3}
    one = jobs.fit(str(tmp_path), 1, settings, log_every_n_steps=1)[2]._tally.latest
    first, second = processes.run(figures, str(tmp_path), settings)
    assert first == second
    assert first == pytest.approx(one, rel=0.02)


def figures(directory: str, settings: dict) -> dict:
    return jobs.fit(directory, 2, settings, log_every_n_steps=1, **sharded.SHARDED)[2]._tally.latest
