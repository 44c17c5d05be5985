"""A transformers sequence classifier with LoRA adapters of PEFT. Run it with `python lora.py`.

A small BERT, randomly initialised, learns whether a text speaks more of day or of night. Only the
adapters and the classification head are trained. No network, half a minute on two cores.
"""

from __future__ import annotations

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_privacy import DifferentialPrivacy

LENGTH = 24
WORDS = 64  # words 2 to 32 speak of day, 33 to 63 of night


class TextClassifier(L.LightningModule):
    """An ordinary fine-tuning. The model's own loss is a mean over the texts: that is all right."""

    def __init__(self, learning_rate: float = 1e-2) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=WORDS,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=LENGTH,
            num_labels=2,
        )
        adapters = LoraConfig(
            task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value", "dense"]
        )
        self.model = get_peft_model(BertForSequenceClassification(config), adapters)
        self.learning_rate = learning_rate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        words, labels = batch
        return self.model(input_ids=words, labels=labels).loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        words, labels = batch
        output = self.model(input_ids=words, labels=labels)
        self.log("val_loss", output.loss)
        accuracy = (output.logits.argmax(dim=1) == labels).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate)


def texts(count: int, seed: int) -> TensorDataset:
    """Make texts of random words; the label says which half of the words is more frequent."""
    seeded = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=seeded)
    night = torch.rand(count, LENGTH, generator=seeded) < 0.2 + 0.6 * labels[:, None]
    words = torch.randint(2, 33, (count, LENGTH), generator=seeded) + 31 * night
    return TensorDataset(words, labels)


def main(max_epochs: int = 3) -> L.Trainer:
    """Train; with privacy that is the callback, and nothing else."""
    privacy = DifferentialPrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0, expected_batch_size=128)
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[privacy],
    )
    trainer.fit(
        TextClassifier(),
        DataLoader(texts(4000, seed=1), batch_size=128, shuffle=True),
        DataLoader(texts(1000, seed=2), batch_size=500),
    )
    print(f"accuracy on held-out texts: {trainer.callback_metrics['val_accuracy']:.1%}")
    return trainer


if __name__ == "__main__":
    L.seed_everything(0)  # initial weights; draws and noise do not follow from it
    main()
