"""A whole private fit of PrivacyPreserveNet on a 4-bit Llama-7B under a memory cap, on one GPU.

    python tests/benchmarks/multimodal_gpu.py --output multimodal_gpu.json

Random weights of exactly Llama-2-7B's shape in NF4 with double quantisation, LoRA of rank 8 on all
linear layers, an image and an audio encoder, text; DP with noise on and all guards at their
defaults, attention noise, a validation, a checkpoint. Prints the peak and seconds per private
step. ``--tiny`` is a dry run on any machine; ``--attention_noise 0`` leaves that noise out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.callbacks import AttentionNoise, MemoryCap
from lightning_privacy.data import GlyphCorpus, GlyphsAndTones
from lightning_privacy.models import (
    AudioSettings,
    ImageSettings,
    PretrainedDecoder,
    PrivacyPreserveNet,
)

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


class Clock(L.Callback):
    """Seconds of each private step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._last = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(round(time.monotonic() - self._last, 3))


def model_of(config: dict[str, int]) -> PrivacyPreserveNet:
    """The model, with random weights of a configuration."""
    return PrivacyPreserveNet(
        modalities=["text", "image", "audio"],
        pretrained=PretrainedDecoder(config_values=config, rank=8),
        image=ImageSettings(hidden_size=64, grid=4),
        audio=AudioSettings(hidden_size=64, tokens=16),
        learning_rate=1e-3,
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One fit; its figures."""
    data = GlyphsAndTones(
        GlyphCorpus(n_users=200, test_examples=0),
        batch_size=options.rows,
        max_length=96,
        padding="max_length",
    )
    privacy = DifferentialPrivacy(epsilon=8.0, delta=1e-5, expected_batch_size=options.batch)
    cap, clock = MemoryCap(options.cap), Clock()
    callbacks: list[L.Callback] = [privacy, cap, clock]
    if options.attention_noise:
        callbacks.append(AttentionNoise(options.attention_noise, method=options.method))
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=options.steps,
            max_epochs=-1,
            precision="bf16-mixed",
            logger=False,
            default_root_dir=folder,
            log_every_n_steps=1,
            limit_val_batches=2,
            val_check_interval=options.steps,
            check_val_every_n_epoch=None,
            enable_progress_bar=False,
            callbacks=callbacks,
        )
        began = time.monotonic()
        trainer.fit(model_of(TINY if options.tiny else LLAMA_7B), datamodule=data)
        wall = time.monotonic() - began
    shown = trainer.callback_metrics
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "cap_gib": options.cap,
        "peak_reserved_gib": cap.peak_gib,
        "epsilon": privacy.epsilon(),
        "private_steps": privacy.steps,
        "expected_batch": options.batch,
        "physical_rows": options.rows,
        "seconds_per_step": clock.seconds,
        "seconds_of_the_fit": round(wall, 1),
        "attention_noise": options.attention_noise,
        **{name: float(value) for name, value in shown.items()},
    }


def main() -> None:
    """Read the options, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16, help="expected batch size")
    parser.add_argument("--rows", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--cap", type=float, default=12.0, help="GiB")
    parser.add_argument("--attention_noise", type=float, default=0.1)
    parser.add_argument("--method", default="auto", help="of the attention noise")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = json.dumps(run(options), indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
