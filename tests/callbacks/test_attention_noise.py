"""`AttentionNoise` in fits: private and not, stopped and resumed, and what it leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy import AttentionNoise
from lightning_privacy.attention import transformers as ours
from lightning_privacy.attention.inject import find
from lightning_privacy.attention.modules import is_wrapped
from lightning_privacy.clipping.randomness import is_still
from lightning_privacy.errors import ConfigurationError
from tests.callbacks.training import LIGHTNING_NOISE, privacy, same, trainer, weights

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in LIGHTNING_NOISE),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended"),
]

WIDTH, LENGTH, HEADS, ROWS = 8, 6, 2, 40


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.back = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.project(x).chunk(3, -1)]
        output = F.scaled_dot_product_attention(*parts)
        return self.back(output.transpose(1, 2).flatten(2))


class Sequences(pl.LightningModule):
    """A classifier of sequences with one attention layer."""

    def __init__(self, lr: float = 0.5) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.attention, self.head = Attention(), nn.Linear(WIDTH, 2)
        self.lr = lr
        self.seen: list[Tensor] = []

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x).mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.logits(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.logits(batch[0]).detach())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.logits(batch[0]).detach())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.logits(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def rows(batch_size: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, LENGTH, WIDTH, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0, 0] > 0).long()), batch_size=batch_size)


class Watch(pl.Callback):
    """Notes what was logged, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.steps.append({name: float(v) for name, v in trainer.callback_metrics.items()})


def fit(
    directory: Path, noise: AttentionNoise | None, *more: pl.Callback, **options: Any
) -> dict[str, Tensor]:
    module = options.pop("module", None) or Sequences()
    callbacks = [*([noise] if noise else []), *more]
    trainer(directory, *callbacks, **options).fit(module, rows())
    return weights(module)


def clean(module: nn.Module) -> bool:
    return not any(is_wrapped(site.module) for site in find(module))


def test_noise_changes_training_and_a_seed_repeats_it(tmp_path: Path) -> None:
    plain = fit(tmp_path, None)
    first, again = (fit(tmp_path, AttentionNoise(1.0, seed=1)) for _ in range(2))
    assert same(first, again)
    assert not same(first, plain)
    assert not same(first, fit(tmp_path, AttentionNoise(1.0, seed=2)))
    assert not same(fit(tmp_path, AttentionNoise(1.0)), fit(tmp_path, AttentionNoise(1.0)))
    assert same(fit(tmp_path, AttentionNoise(0.0)), plain)


@pytest.mark.parametrize("where", ["logits", "weights"])
def test_a_private_fit_passes_its_checks_and_spends_the_same(tmp_path: Path, where: Any) -> None:
    private = [privacy(test_seed=None, journal=False, noise_multiplier=1.0) for _ in range(2)]
    fit(tmp_path, None, private[0], max_epochs=2)
    fit(tmp_path, AttentionNoise(2.0, where), private[1], max_epochs=2)
    assert private[0].epsilon() == private[1].epsilon() > 0


def test_the_checks_still_see_a_mixture_of_examples(tmp_path: Path) -> None:
    class Mixing(Sequences):
        def logits(self, x: Tensor) -> Tensor:
            return super().logits(x - x.mean(0))

    with pytest.raises(Exception, match="depends on that example alone"):
        fit(tmp_path, AttentionNoise(1.0), privacy(), module=Mixing())


def test_micro_batches_of_one_step_have_noise_of_their_own(tmp_path: Path) -> None:
    """Copies of one example, in one logical batch: each meets other noise."""
    found: list[Tensor] = []

    class Copies(Sequences):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0] * 0 + torch.arange(LENGTH)[:, None]
            if not is_still():
                found.extend(self.attention(x).detach())
            return super().training_step(batch, batch_idx)

    module = Copies(lr=0.0)
    settings = privacy(expected_batch_size=20, independence_check=False)
    fit(tmp_path, AttentionNoise(1.0, seed=1), settings, module=module)
    assert len({tuple(one.flatten().tolist()) for one in found}) == len(found) > 30


def test_the_size_of_noise_and_perturbation_is_logged_each_step(tmp_path: Path) -> None:
    watch, noise = Watch(), AttentionNoise(1.0, schedule="linear", seed=1)
    fit(tmp_path, noise, watch, max_steps=10, log_every_n_steps=1)
    sizes = [step["attention_noise/std"] for step in watch.steps]
    assert sizes == pytest.approx([1 - n / 10 for n in range(10)])
    effects = [step["attention_noise/perturbation"] for step in watch.steps]
    assert len(set(effects)) == 10
    assert effects[0] > 2 * effects[-1] > 0


def test_the_perturbation_is_measured_where_it_is_logged(tmp_path: Path) -> None:
    """And in the first step; it takes as long as a few layers."""
    watch = Watch()
    fit(tmp_path, AttentionNoise(1.0, seed=1), watch, max_steps=10, log_every_n_steps=4)
    effects = [float(step["attention_noise/perturbation"]) for step in watch.steps]
    changes = [n for n in range(1, 10) if effects[n] != effects[n - 1]]
    assert changes == [3, 7]


def test_every_step_has_noise_of_its_own(tmp_path: Path) -> None:
    """The same rows and weights in ten steps of two epochs."""
    x, y = rows().dataset[:4]
    data = DataLoader(TensorDataset(x.repeat(5, 1, 1), y.repeat(5)), batch_size=4)
    watch = Watch()
    options = {"max_epochs": 2, "log_every_n_steps": 1}
    trainer(tmp_path, AttentionNoise(1.0, seed=1), watch, **options).fit(Sequences(lr=0.0), data)
    effects = [step["attention_noise/perturbation"] for step in watch.steps]
    assert len(set(effects)) == len(effects) == 10


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1]),
        ("linear", [1, 0.5, 0.1]),
        ("cosine", [1, 0.5, 0.0245]),
        ("warmup", [0, 1, 1]),
        (lambda done: done * 2, [0, 1, 1.8]),
    ],
)
def test_schedules(schedule: Any, expected: list[float], tmp_path: Path) -> None:
    watch = Watch()
    fit(tmp_path, AttentionNoise(1.0, schedule=schedule), watch, max_steps=10)
    sizes = [step["attention_noise/std"] for step in watch.steps]
    assert [sizes[n] for n in (0, 5, 9)] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("how", [ValueError, KeyboardInterrupt])
def test_the_module_is_restored_however_a_fit_ends(
    how: type[BaseException], tmp_path: Path
) -> None:
    module, noise = Sequences(), AttentionNoise(1.0)
    fit(tmp_path, noise, module=module)
    assert clean(module)

    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            assert not clean(module)
            raise how

    with pytest.raises((how, SystemExit)):
        fit(tmp_path, noise, Stops(), module=module)
    assert clean(module)
    assert noise.std == 0


def test_validation_is_quiet_unless_asked(tmp_path: Path) -> None:
    shown = []
    for at_inference in (False, True):
        module = Sequences(lr=0.0)
        noise = AttentionNoise(1.0, at_inference=at_inference, seed=1)
        runner = trainer(tmp_path, noise)
        runner.fit(module, rows(), rows(ROWS))
        (during,) = module.seen
        runner.validate(module, rows(ROWS), verbose=False)
        runner.test(module, rows(ROWS), verbose=False)
        predicted = torch.cat(runner.predict(module, rows(ROWS)))
        assert clean(module)
        with torch.no_grad():
            plain = module.logits(rows(ROWS).dataset.tensors[0])
        outputs = [during, *module.seen[1:], predicted]
        shown.append([float((output - plain).abs().max()) for output in outputs])
    assert max(shown[0]) < 1e-5
    assert min(shown[1]) > 1e-2


def test_a_resumed_fit_goes_on_with_the_noise_of_its_seed(tmp_path: Path) -> None:
    def callbacks() -> list[pl.Callback]:
        return [
            AttentionNoise(1.0, schedule="cosine", seed=4),
            privacy(journal=False),
            pl.callbacks.ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=5),
        ]

    whole = fit(tmp_path / "a", *callbacks()[:2], max_steps=10)
    trainer(tmp_path, *callbacks(), max_steps=10).fit(StopsAt(5), rows())
    module = Sequences()
    (path,) = tmp_path.glob("last.ckpt")
    trainer(tmp_path, *callbacks(), max_steps=10).fit(module, rows(), ckpt_path=path)
    assert same(whole, weights(module))


class StopsAt(Sequences):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == self.step:
            self.trainer.should_stop = True


def test_nothing_of_the_noise_is_in_a_checkpoint(tmp_path: Path) -> None:
    noise = AttentionNoise(1.0)
    fit(tmp_path, noise, pl.callbacks.ModelCheckpoint(tmp_path, filename="all"))
    saved = torch.load(tmp_path / "all.ckpt", weights_only=False)
    assert not any("AttentionNoise" in name for name in saved["callbacks"])
    assert set(saved["state_dict"]) == set(Sequences().state_dict())


def test_a_layer_that_computes_its_attention_elsewhere_is_noticed(tmp_path: Path) -> None:
    class Bypassed(Sequences):
        def logits(self, x: Tensor) -> Tensor:
            layer = self.attention
            return self.head(layer.back(layer.project(x)[..., :WIDTH]).mean(1))

    with pytest.raises(ConfigurationError, match="none of attention asked for noise"):
        fit(tmp_path, AttentionNoise(1.0), module=Bypassed())

    class Partly(Sequences):
        def __init__(self) -> None:
            super().__init__()
            self.unused = Attention()

    with pytest.warns(UserWarning, match="no noise reached unused"):
        fit(tmp_path, AttentionNoise(1.0), module=Partly())


@pytest.mark.parametrize(
    "settings",
    [{"std": -1}, {"std": float("nan")}, {"std": float("inf")}, {"std": 1, "where": "values"},
     {"std": 1, "method": "fast"}, {"std": 1, "schedule": "weekly"}],
)  # fmt: skip
def test_arguments_outside_their_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        AttentionNoise(**settings)


def test_a_model_is_noised_outside_of_a_trainer(tmp_path: Path) -> None:
    module, noise = Sequences().eval(), AttentionNoise(1.0, at_inference=True)
    x = rows(ROWS).dataset.tensors[0]
    with torch.no_grad():
        plain = module.logits(x)
        with noise.applied_to(module):
            assert float((module.logits(x) - plain).abs().max()) > 1e-2
        torch.testing.assert_close(module.logits(x), plain)
    assert clean(module)


# ---------------------------------------------------------------------- a language model with LoRA
class Language(pl.LightningModule):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.random.fork_rng():
            torch.manual_seed(3)
            config = LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                use_cache=False,
            )
            lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            self.model = get_peft_model(LlamaForCausalLM(config), lora)
        if reentrant is not None:
            self.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            self.model.enable_input_require_grads()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, mask = batch
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        real = mask[:, 1:] * mask[:, :-1]
        return ((losses.view_as(real) * real).sum(1) / real.sum(1)).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["logits", "weights"])
def test_a_private_llama_with_lora_and_checkpointing(tmp_path: Path, where: Any) -> None:
    pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32, (32, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(32):
        mask[row, : row % 4] = 0
    found = []
    for reentrant in (None, False, True):
        module = Language(reentrant)
        noise = AttentionNoise(1.0, where, seed=1)
        settings = privacy(expected_batch_size=12)
        trainer(tmp_path, noise, settings, max_epochs=3).fit(
            module, DataLoader(TensorDataset(ids, mask), batch_size=4)
        )
        assert module.model.config._attn_implementation == "sdpa"
        assert not any(ours.is_noised(part) for part in module.modules())
        found.append(weights(module))
    moved = max(float((found[0][n] - w).abs().max()) for n, w in weights(Language(None)).items())
    for other in found[1:]:
        furthest = max(float((found[0][n] - w).abs().max()) for n, w in other.items())
        assert furthest < 1e-4 * moved


def test_the_callback_of_privacy_and_this_one_go_in_any_order(tmp_path: Path) -> None:
    first = fit(tmp_path, AttentionNoise(1.0, seed=1), privacy())
    module = Sequences()
    trainer(tmp_path, privacy(), AttentionNoise(1.0, seed=1)).fit(module, rows())
    assert same(first, weights(module))
