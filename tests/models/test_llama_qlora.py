from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.clipping import per_example_gradients
from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError
from lightning_privacy.models import LlamaQLoRA, _loading
from tests.clipping.reference import in_double
from tests.models.checkpoints import SIZES, write_checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

VOCABULARY = 60
MADE_UP = {"checkpoint": None, "config": {**SIZES, "vocab_size": VOCABULARY}}
EXACT = {"quantization": "none", "dtype": "float32", "rank": 4}


def built(**settings) -> LlamaQLoRA:
    """A loaded module, trained a little: fresh adapters add nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = LlamaQLoRA(**{**MADE_UP, **settings})
        module.configure_model()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.data.normal_(std=0.2)
    return module


def batch_of(*lengths: int, task: str = "causal_lm") -> dict[str, torch.Tensor]:
    width = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=torch.Generator())
    kept = torch.arange(width) < torch.tensor(lengths)[:, None]
    batch = {"input_ids": ids.masked_fill(~kept, 2), "attention_mask": kept.long()}
    batch["labels"] = ids.masked_fill(~kept, -100)
    batch["labels"][:, :2] = -100
    if task == "classification":
        batch["labels"] = torch.arange(len(lengths)) % 2
    return batch


def row_of(batch, row):
    length = int(batch["attention_mask"][row].sum())
    return {
        key: value[row : row + 1, :length] if value.dim() > 1 else value[row : row + 1]
        for key, value in batch.items()
    }


def mean_loss(module, batch):
    return module.losses(batch).mean()


# ---------------------------------------------------------------------- per-example gradients
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "keeping"])
@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_per_example_gradients_are_those_of_each_row_alone(task, checkpointing, dtype):
    module = built(**EXACT, task=task, gradient_checkpointing=checkpointing).to(dtype)
    if dtype == torch.float32:
        check_gradients(module, task, 2e-5)
        return
    with in_double():
        check_gradients(module, task, 1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"dora": True},
        {"rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {"quantization": "nf4"},
        pytest.param({"quantization": "nf4", "dora": True}, marks=pytest.mark.slow),
    ],
    ids=["dora", "rslora", "nf4", "nf4 and dora"],
)
def test_per_example_gradients_of_the_variants(settings):
    settings = {**EXACT, **settings}
    # In evaluation mode 4-bit layers stay as they are, too.
    check_gradients(built(**settings), "causal_lm", 2e-4)


def check_gradients(module, task, tolerance):
    """In a batch whose rows differ in length, against a loop over rows without padding."""
    batch = batch_of(9, 5, 12, task=task)
    found = per_example_gradients(module, mean_loss, batch)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys()
    for row in range(3):
        alone = torch.autograd.grad(mean_loss(module, row_of(batch, row)), trained.values())
        for name, expected in zip(trained, alone, strict=True):
            difference = (found[name][row] - expected).norm()
            assert difference <= tolerance * max(expected.norm().item(), 1e-2), name
            assert expected.norm() > 0


def test_checkpointing_and_dropout_are_on_in_training(checkpoint):
    # A model that is read comes in evaluation mode.
    module = built(checkpoint=checkpoint, config=None, **EXACT, dropout=0.5)
    assert all(part.training for part in module.modules())
    batch = batch_of(9, 5)
    assert not torch.equal(module.losses(batch), module.losses(batch))
    recomputed = []
    layer = module.network.get_base_model().model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: recomputed.append(1))
    module.losses(batch).mean().backward()
    assert len(recomputed) == 2


def test_the_head_of_a_batch_is_never_whole(monkeypatch):
    seen = []
    linear = torch.nn.functional.linear

    def noting(x, weight, bias=None):
        out = linear(x, weight, bias)
        seen.append(out.shape)
        return out

    monkeypatch.setattr("lightning_privacy.models.losses._PIECE", 4 * VOCABULARY)
    monkeypatch.setattr(torch.nn.functional, "linear", noting)
    built(**EXACT).losses(batch_of(9, 5))
    assert max(shape.numel() for shape in seen if shape[-1] == VOCABULARY) == 4 * VOCABULARY


# ---------------------------------------------------------------------- loading
@pytest.mark.parametrize(
    ("quantization", "layer"),
    [("nf4", "Linear4bit"), ("int8", "Linear8bitLt"), ("none", "Linear")],
)
@pytest.mark.parametrize("origin", ["read", "made up"])
def test_the_base_is_quantised_and_frozen(origin, quantization, layer, checkpoint):
    given = {"checkpoint": checkpoint} if origin == "read" else MADE_UP
    module = LlamaQLoRA(**given, quantization=quantization, rank=2)
    module.configure_model()
    base = module.network.get_base_model()
    linear = base.model.layers[0].mlp.up_proj.base_layer
    assert type(linear).__name__ == layer
    if quantization == "nf4":
        assert linear.weight.quant_state.quant_type == "nf4"
        assert linear.weight.quant_state.nested  # double quantisation
    assert type(base.lm_head) is torch.nn.Linear
    assert base.lm_head.weight.dtype == torch.bfloat16
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_the_rest_of_the_family_is_read(kind, tmp_path):
    sizes = {"head_dim": 8} if kind == "qwen3" else {}
    module = LlamaQLoRA(checkpoint=write_checkpoint(tmp_path, kind, **sizes), **EXACT)
    module.configure_model()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = batch_of(9)
    scores = base(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(module(batch), scores)


def test_a_made_up_base_is_always_the_same_one():
    one, two = (LlamaQLoRA(**MADE_UP, **EXACT) for _ in range(2))
    for module in (one, two):
        module.configure_model()
    frozen = {name: p for name, p in one.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, dict(two.named_parameters())[name]) for name, p in frozen.items())


def test_a_made_up_base_is_quantised_layer_by_layer(monkeypatch):
    whole, quantise = [], _loading._quantised

    def watched(linear, *arguments):
        assert sum(weight() is not None for weight in whole) <= 1
        whole.append(weakref.ref(linear.weight))
        return quantise(linear, *arguments)

    monkeypatch.setattr(_loading, "_quantised", watched)
    LlamaQLoRA(**MADE_UP).configure_model()
    assert len(whole) == 14


def test_evaluation_leaves_four_bit_weights_as_they_are():
    module = built(rank=2)
    batch = batch_of(9, 5)
    before = {name: p.clone() for name, p in module.named_parameters()}
    trained = module.losses(batch)
    module.eval()
    with torch.no_grad():
        evaluated = module.losses(batch)
    module.train()
    torch.testing.assert_close(evaluated, trained)
    torch.testing.assert_close(module.losses(batch), trained)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


# ---------------------------------------------------------------------- training and checkpoints
class Rows(lightning.LightningDataModule):
    def __init__(self, task="causal_lm", count=24):
        super().__init__()
        self.task, self.batch_size, self.max_length = task, 4, 12
        whole = batch_of(*[5 + i % 8 for i in range(count)], task=task)
        self.rows = [{key: value[i] for key, value in whole.items()} for i in range(count)]

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=self.batch_size)


def fit(module, data, steps, folder, *, resume=None, **settings):
    privacy = DifferentialPrivacy(
        noise_multiplier=0.5, delta=1e-3, expected_batch_size=8, test_seed=3, print_table=False
    )
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[privacy],
        **settings,
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=None if resume is None else True)
    return trainer


def adapters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_a_checkpoint_holds_adapters_only_and_a_resumed_run_goes_on_exactly(
    task, checkpoint, tmp_path
):
    settings = {"checkpoint": checkpoint, "task": task, "rank": 2, "learning_rate": 1e-2}
    settings |= {"warmup_steps": 3}

    def fresh(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = LlamaQLoRA(**settings)
            module.configure_model()
        return module

    whole = fresh(0)
    fit(whole, Rows(task), 4, tmp_path)
    half = fresh(0)
    trainer = fit(half, Rows(task), 2, tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    held = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert held.keys() == adapters(half).keys()
    assert all("lora_" in name or "modules_to_save" in name for name in held)
    # Another initialisation, which the checkpoint replaces.
    resumed = fresh(1)
    fit(resumed, Rows(task), 4, tmp_path, resume=tmp_path / "half.ckpt")
    loaded = LlamaQLoRA.load_from_checkpoint(tmp_path / "half.ckpt", weights_only=True)
    batch = batch_of(9, 5, task=task)
    torch.testing.assert_close(loaded.losses(batch), half.losses(batch), rtol=0, atol=0)
    for name, parameter in adapters(whole).items():
        assert torch.equal(adapters(resumed)[name], parameter), name


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    module = built(**EXACT)
    trainer = fit(module, Rows(), 1, tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = LlamaQLoRA(**{**MADE_UP, **EXACT, "rank": 2})
    with pytest.raises(ConfigurationError, match="same layers and rank"):
        fit(other, Rows(), 2, tmp_path, resume=tmp_path / "a.ckpt")


def test_a_classification_reports_its_accuracy(tmp_path):
    module = built(**EXACT, task="classification")
    trainer = fit(module, Rows("classification"), 1, tmp_path)
    metrics = trainer.validate(module, Rows("classification"), verbose=False)[0]
    scores = torch.cat(trainer.predict(module, Rows("classification").val_dataloader()))
    labels = torch.stack([row["labels"] for row in Rows("classification").rows])
    right = (scores.argmax(dim=1) == labels).float().mean().item()
    assert metrics["val_accuracy"] == pytest.approx(right)
    assert "train_loss" in trainer.callback_metrics or "val_loss" in metrics


# ---------------------------------------------------------------------- afterwards
@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_plain_peft_and_transformers_read_the_adapter(task, checkpoint, tmp_path):
    module = built(checkpoint=checkpoint, config=None, **EXACT, task=task)
    module.save_adapter(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    kinds = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    kind = kinds[task == "classification"]
    base = kind.from_pretrained(checkpoint, pad_token_id=2)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    batch = row_of(batch_of(9, 5, task=task), 1)
    expected = loaded(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(module(batch), expected)
    merged = module.merge("float32")
    assert "Peft" not in type(merged).__name__
    assert all("lora" not in name for name in merged.state_dict())
    merged.config.pad_token_id = 2
    scores = merged(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_it_continues_a_text(checkpoint):
    module = built(checkpoint=checkpoint, config=None, **EXACT)
    one, two = module.generate(["To be", "or"], max_new_tokens=5)
    assert module.training
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.tensor([[1, *tokenizer("or", add_special_tokens=False)["input_ids"]]])
    module.eval()
    for _ in range(5):
        ids = torch.cat([ids, module({"input_ids": ids})[:, -1].argmax(dim=1, keepdim=True)], 1)
    assert two == tokenizer.decode(ids[0, 3:], skip_special_tokens=True)
    assert one
    with torch.random.fork_rng():
        assert module.generate(["or"], max_new_tokens=5, temperature=5.0)


@pytest.mark.parametrize("use", ["merge", "generate"])
def test_a_made_up_base_has_nothing_to_merge_into_and_no_tokeniser(use):
    with pytest.raises(ConfigurationError, match="`checkpoint` instead of `config`"):
        getattr(built(**EXACT), use)(*([["a"]] if use == "generate" else []))


def test_a_classification_continues_no_text(checkpoint):
    module = built(checkpoint=checkpoint, config=None, task="classification", **EXACT)
    with pytest.raises(UnsupportedOperationError, match="'causal_lm'"):
        module.generate(["or"])


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"dropout": 1.0}, "dropout"),
        ({"alpha": 0.0}, "alpha"),
        ({"quantization": "fp4"}, "quantization"),
        ({"task": "regression"}, "task"),
        ({"dtype": "float16"}, "dtype"),
        ({"num_labels": 1}, "num_labels"),
        ({"checkpoint": "a/b"}, "`config`"),
        ({"config": None}, "Neither"),
    ],
)
def test_wrong_arguments_are_refused_by_name(settings, named):
    with pytest.raises(ConfigurationError, match=named):
        LlamaQLoRA(**{**MADE_UP, **settings})


def test_a_wrong_path_is_refused_before_loading(tmp_path):
    for path, found in ((tmp_path / "no", "no folder"), (tmp_path, "no 'config.json'")):
        with pytest.raises(ConfigurationError, match=found):
            LlamaQLoRA(checkpoint=str(path)).configure_model()


def test_a_folder_without_weights_is_refused(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="no file named model.safetensors"):
        LlamaQLoRA(checkpoint=str(tmp_path), **EXACT).configure_model()


def test_adapters_on_layers_that_are_not_there_are_refused_with_those_that_are():
    with pytest.raises(ConfigurationError, match="`target_modules`.*") as caught:
        built(target_modules=["q_proyekt"], **EXACT)
    assert "q_proyekt" in caught.value.found
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj" in caught.value.remedy


def test_another_architecture_is_refused(tmp_path):
    transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedOperationError, match="'gpt2'"):
        LlamaQLoRA(checkpoint=str(tmp_path)).configure_model()
    (tmp_path / "config.json").write_text('{"model_type": "not_yet_invented"}')
    with pytest.raises(ConfigurationError, match="not_yet_invented"):
        LlamaQLoRA(checkpoint=str(tmp_path)).configure_model()


def test_quantised_weights_are_refused(checkpoint, tmp_path):
    settings = json.loads((Path(checkpoint) / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedOperationError, match="quantised already"):
        LlamaQLoRA(checkpoint=str(tmp_path)).configure_model()


LARGE = {"checkpoint": None, "config": {"vocab_size": 32000, "intermediate_size": 11008}}


def test_a_large_model_is_not_trained_on_a_cpu_by_accident(monkeypatch):
    module = LlamaQLoRA(**LARGE)
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    with pytest.raises(ConfigurationError, match="6.7 billion parameters is trained on a GPU"):
        module.configure_model()


def test_too_little_memory_is_refused_with_the_change_that_fits(monkeypatch):
    def free(gibibytes):
        monkeypatch.setattr(
            "lightning_privacy.models._memory.available_memory", lambda _: gibibytes * 2**30
        )

    module = LlamaQLoRA(**LARGE, allow_cpu=True, gradient_checkpointing=False)
    module._trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        datamodule=SimpleNamespace(batch_size=16, max_length=512),
    )
    for gibibytes, remedy in (
        (11, "--model.gradient_checkpointing true, which"),
        (6.5, "--model.gradient_checkpointing true --data.batch_size 4, which"),
        (4.9, "--data.batch_size 1 --data.max_length"),
        (3, "Use a device with"),
    ):
        free(gibibytes)
        with pytest.raises(ConfigurationError, match=remedy):
            module.configure_model()
    assert module.network is None


def test_data_of_another_task_or_with_more_classes_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="model.task.*classification"):
        fit(built(**EXACT), Rows("classification"), 1, tmp_path)
    data = Rows("classification")
    data.num_labels = 3
    with pytest.raises(ConfigurationError, match="model.num_labels` to 3"):
        fit(built(**EXACT, task="classification"), data, 1, tmp_path)
