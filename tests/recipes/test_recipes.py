"""Every recipe parses, says what it needs, and runs at a small size."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image
from transformers import AutoTokenizer

from lightning_privacy.cli import main
from lightning_privacy.cli.planning import _plan_of_recipe
from lightning_privacy.cli.training import PrivacyCLI, read_recipe
from tests.distributed.worlds import Processes
from tests.models.checkpoints import write_checkpoint

for package in ("transformers", "peft", "bitsandbytes", "datasets"):
    pytest.importorskip(package)
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SHAKESPEARE = ROOT.parent / "shared" / "data" / "shakespeare_users.jsonl"

SMALL_MODEL = [
    "--data.batch_size=8",
    "--model.hidden_size=16",
    "--model.num_layers=1",
    "--model.num_heads=2",
    "--model.num_key_value_heads=1",
    "--privacy.expected_batch_size=12",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
]
FEW_USERS = [
    *SMALL_MODEL,
    "--data.embedded.n_users=60",
    "--data.embedded.docs_per_user=40",
    "--trainer.max_steps=2",
]
# What a user types for these, and a size that a CPU does in seconds.
LLAMA = [
    "--data.batch_size=4",
    "--data.max_length=32",
    "--data.val_fraction=0.3",
    "--data.num_workers=0",
    "--privacy.expected_batch_size=8",
    "--privacy.delta=1.0e-3",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=1",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
]
# Few examples of several modalities, for a very small decoder.
MULTIMODAL = [
    "--data.batch_size=8",
    "--model.decoder.hidden_size=16",
    "--model.decoder.num_layers=1",
    "--privacy.expected_batch_size=12",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.check_val_every_n_epoch=1",
]
GLYPHS = [*MULTIMODAL, "--data.corpus.n_users=12", "--data.corpus.test_examples=4"]
SMALL_LLAMA = [
    "--model.hidden_size=16",
    "--model.num_layers=1",
    "--model.num_heads=2",
    "--model.num_key_value_heads=1",
    "--model.intermediate_size=32",
    "--model.vocab_size=300",
]
# A group of another run's: a second run in the same folder would find the budget spent.
ALONE = [*GLYPHS, "--privacy.ledger=null"]
# Overlays, which go on top of another recipe.
BELOW = {
    f"multimodal/ablation/{name}.yaml": "multimodal/quick.yaml"
    for name in ("full", "without_noise", "without_clipping", "without_attention_noise")
}
LARGE_MULTIMODAL = [
    "--model.pretrained.dtype=float32",
    "--data.preprocessing.image.size=16",
    "--data.preprocessing.audio.seconds=0.5",
    "--data.labels=[calm, loud]",
    "--trainer.precision=32-true",
    "--model.pretrained.rank=2",
]
TINY = {
    "multimodal/quick.yaml": GLYPHS,
    "multimodal/pretrain.yaml": ALONE,
    "multimodal/finetune.yaml": [*ALONE, "--model.initial_weights=null"],
    "multimodal/av_digits.yaml": [*MULTIMODAL, "--data.val_fraction=0.5"],
    "multimodal/llama7b.yaml": [*LLAMA, *LARGE_MULTIMODAL],
    **dict.fromkeys(BELOW, GLYPHS),
    "llama7b/qlora_8gb.yaml": LLAMA,
    "llama7b/qlora_12gb.yaml": LLAMA,
    "llama7b/qlora_24gb.yaml": LLAMA,
    "llama7b/classify.yaml": LLAMA,
    "llama7b/pretrain_1b.yaml": [*LLAMA, *SMALL_LLAMA],
    "quickstart.yaml": [
        *SMALL_MODEL,
        "--data.embedded.n_users=60",
        "--trainer.max_epochs=1",
        "--trainer.val_check_interval=1",
    ],
    "attention_noise.yaml": [*SMALL_MODEL, "--data.embedded.n_users=60"],
    "distributed/ddp.yaml": FEW_USERS,
    "distributed/qlora_ddp.yaml": LLAMA,
    "distributed/pretrain_fsdp.yaml": [*LLAMA, *SMALL_LLAMA],
    "user_level/users.yaml": FEW_USERS,
    "user_level/examples.yaml": FEW_USERS,
    "user_level/tiers.yaml": FEW_USERS,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """The folder of a small Llama with its tokeniser."""
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


def archive(folder: Path) -> Path:
    """A file of made-up digits in the form of the real one."""
    rng, count = np.random.default_rng(0), 200
    np.savez(
        folder / "digits.npz",
        image=rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
        digit=np.arange(count) % 10,
        speaker=np.arange(count) % 2,
        take=np.arange(count) // 20,
        speakers=np.array(["ann", "bob"]),
        wave=rng.integers(-9000, 9000, 800 * count, dtype=np.int16),
        offset=800 * np.arange(count + 1),
        sample_rate=8000,
    )
    return folder / "digits.npz"


def manifest(folder: Path) -> Path:
    """Sentences with pictures and sounds, of which every third has none."""
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(folder / "picture.png")
    soundfile.write(folder / "tone.wav", np.sin(np.arange(4000) / 5), 16000)
    rows = [
        {
            "text": f"text {i}.",
            "label": ["calm", "loud"][i % 2],
            "audio": "tone.wav" if i % 3 else "",
            "image": "picture.png" if i % 4 else "",
        }
        for i in range(60)
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "manifest.jsonl"


def configs(path: Path) -> list[str]:
    """The recipe as a user names it: an overlay behind what it goes on top of."""
    below = BELOW.get(name_of(path))
    return [*(["--config", str(ROOT / "recipes" / below)] if below else []), "--config", str(path)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


@pytest.fixture
def given(checkpoint, folder):
    """By recipe, what a user has to type besides the recipe itself."""
    rows = [{"text": f"text {i}.", "user": f"user {i % 9}", "label": str(i % 2)} for i in range(60)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = [f"--model.checkpoint={checkpoint}", f"--data.path={path}"]
    names = [name for name in TINY if name.startswith("llama7b") or "qlora" in name]
    own_text = [both[1], f"--data.tokenizer={checkpoint}"]
    return {
        **{name: [] for name in TINY},
        "multimodal/av_digits.yaml": [f"--data.path={archive(folder)}"],
        "multimodal/llama7b.yaml": [
            f"--model.pretrained.checkpoint={checkpoint}",
            f"--data.path={manifest(folder)}",
        ],
        **dict.fromkeys(names, both),
        "llama7b/pretrain_1b.yaml": own_text,
        "distributed/pretrain_fsdp.yaml": own_text,
    }


def is_distributed(path: Path) -> bool:
    return path.parent.name == "distributed"


def test_there_are_recipes_and_each_has_a_small_size():
    assert {name_of(path) for path in RECIPES} == set(TINY)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_says_what_it_needs(path):
    header = path.read_text().split("\n\n", 1)[0]
    for word in (
        "# Data ",
        "# Hardware ",
        "# Privacy ",
        "# Time ",
        f"--config recipes/{name_of(path)}",
    ):
        assert word in header
    strategy = yaml.safe_load(path.read_text())["trainer"]["strategy"]
    assert strategy in ({"private_ddp", "private_fsdp"} if is_distributed(path) else {"private"})


def undocumented(lines: list[str]) -> list[str]:
    """List the keys that no comment explains, neither theirs nor that of the lines right above."""
    missing, explained = [], False
    for line in lines:
        text = line.strip()
        if not text:
            explained = False
        elif text.startswith("#"):
            explained = True
        elif not text.endswith(":") and "class_path" not in text and not explained:
            missing.append(text)
    return missing


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_is_explained(path):
    assert undocumented(path.read_text().splitlines()) == []
    assert undocumented(["a: 1", "# why", "b: 2", "", "c: 3"]) == ["a: 1", "c: 3"]


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in RECIPES if is_distributed(p)], ids=name_of)
def test_a_distributed_recipe_runs_on_two_ranks(path, folder, given):
    run_on_two_ranks(path, folder, given)


@pytest.mark.slow
def test_adapters_train_on_shards_of_the_base(folder, given):
    path = ROOT / "recipes" / "distributed" / "qlora_ddp.yaml"
    run_on_two_ranks(path, folder, given, "--trainer.strategy=private_fsdp")


def run_on_two_ranks(path, folder, given, *more):
    processes = Processes()
    words = ["fit", "--config", str(path), *given[name_of(path)], *TINY[name_of(path)], *more]
    try:
        shown = processes.run(command, str(folder), words)
    finally:
        processes.stop()
    assert [code for code, _ in shown] == [0, 0]
    assert ["epsilon spent" in text for _, text in shown] == [True, False]
    assert list(folder.rglob("*.ckpt"))


def command(folder: str, words: list[str]) -> tuple[int, str]:
    os.chdir(folder)
    with redirect_stdout(io.StringIO()) as shown:
        code = main(words)
    return code, shown.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in RECIPES if not is_distributed(p)], ids=name_of)
def test_a_recipe_runs(path, folder, given, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    words = ["fit", *configs(path), *given[name_of(path)], *TINY[name_of(path)]]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "epsilon spent" in shown
    compared = yaml.safe_load(path.read_text()).get("compare_without_privacy", False)
    assert ("validation loss without privacy" in shown) == compared
    assert list(folder.rglob("metrics.csv"))
    assert list(folder.rglob("*.ckpt"))
    # Once more in the same folder: nothing of the first run is in the way.
    assert main(words) == 0


@pytest.mark.parametrize("name", sorted(name for name in TINY if name.startswith("llama7b/q")))
def test_two_words_are_all_that_a_user_types(name, given, checkpoint, monkeypatch):
    """The data take the model's tokeniser; the plan needs no more and loads no model."""
    monkeypatch.setattr("lightning_privacy.models.LlamaQLoRA.configure_model", None)
    recipe = read_recipe(["--config", str(ROOT / "recipes" / name), *given[name]])
    assert recipe.data.vocab_size == len(AutoTokenizer.from_pretrained(checkpoint))
    assert len(recipe.train_dataloader().dataset) > 40


@pytest.mark.slow
def test_the_quickstart_promises_what_its_header_says(folder):
    path = ROOT / "recipes" / "quickstart.yaml"
    plan, size, budget, fixed_noise = _plan_of_recipe([str(path)], [])
    assert budget == 8.0
    assert not fixed_noise
    assert 7.9 < plan.epsilon() <= 8.0
    assert plan.delta == 1e-4 < 0.1 / size
    assert 450 < size < 550
    assert plan.steps == 200


def test_the_progress_bar_shows_epsilon(folder):
    path = ROOT / "recipes" / "quickstart.yaml"
    words = [*TINY[name_of(path)], "--compare_without_privacy=false"]
    cli = PrivacyCLI(["fit", "--config", str(path), *words])
    shown = cli.trainer.progress_bar_metrics
    assert 0 < shown["privacy/epsilon"] <= 8.0
    assert "val_loss" in shown


@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="the development data are not here")
def test_the_quickstart_runs_on_a_real_text(folder, capsys):
    path = ROOT / "recipes" / "quickstart.yaml"
    words = [f"--data.path={SHAKESPEARE}", "--data.text_column=text", "--data.user_column=user"]
    words += [*TINY[name_of(path)], "--trainer.max_steps=2", "--compare_without_privacy=false"]
    cli = PrivacyCLI(["fit", "--config", str(path), *words])
    assert 5000 < len(cli.datamodule.users) < 7097
    assert cli.trainer.global_step == 2
    assert "epsilon spent" in capsys.readouterr().out
