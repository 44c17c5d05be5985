"""LoRA fine-tuning of any Llama-family checkpoint, with its base in 4 bits."""

from __future__ import annotations

import tempfile
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from typing_extensions import override

from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError
from lightning_privacy.hub import read_config, read_tokenizer
from lightning_privacy.models._adapters import adapted, continued, merged
from lightning_privacy.models._loading import (
    Quantization,
    Task,
    load_base,
    made_up_base,
    require_family,
    require_valid,
)
from lightning_privacy.models._memory import Workload, require_gpu, require_memory
from lightning_privacy.models._trained import TrainedOnly
from lightning_privacy.models.base import Schedule, TextModule, enable_checkpointing
from lightning_privacy.models.losses import frozen_head_losses

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

LLAMA_2_7B = "meta-llama/Llama-2-7b-hf"

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class LlamaQLoRA(TrainedOnly, TextModule):
    """Low-rank adapters on a frozen Llama, Mistral or Qwen, quantised to 4 bits while it is read.

    QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the linear layers of the blocks are kept in NF4
    with double quantisation, and on each sits a pair of trained low-rank factors in float32 (Hu et
    al. 2021, arXiv 2106.09685). Embeddings, norms and the output layer are frozen too. A
    classification has a head of its own, trained in full, on the last token's state.

    The loss of an example is the mean over that example's own target tokens. The base is loaded in
    `configure_model`, onto the trainer's device; call it yourself to use the model without a
    trainer. Checkpoints hold what is trained and nothing else.

    Args:
        checkpoint: A folder that ``save_pretrained`` wrote, or an id at the Hugging Face hub, of
            the architecture llama, mistral, qwen2 or qwen3; null to make the model up.
        config: Only for tests and benchmarks, together with ``checkpoint: null``: arguments of
            transformers' configuration, with its ``model_type`` (by default llama). The weights are
            random.
        task: ``"causal_lm"``, or ``"classification"`` with a head for ``num_labels`` classes.
        num_labels: Classes; at least 2.
        quantization: ``"nf4"`` (0.52 bytes per weight), ``"int8"`` (1.01), or ``"none"``.
        dtype: Of what is not quantised, and of the computation: ``"bfloat16"`` or ``"float32"``.
        rank: Of the adapters; at least 1.
        alpha: Adapters are scaled by alpha / rank, with ``rslora`` by alpha / sqrt(rank).
        dropout: On the input of the adapters, in [0, 1).
        target_modules: Names of the adapted layers; null for all linear layers of the blocks.
        rslora: Rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732).
        dora: Weight decomposition (Liu et al. 2024, arXiv 2402.09353): also trains the norm of each
            output's weights. About twice as slow.
        gradient_checkpointing: Recompute activations in the backward to save memory.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay.
        betas: Decay rates of AdamW's two moments.
        schedule: What the learning rate does after the warm-up, by optimizer step.
        warmup_steps: Optimizer steps until the learning rate reaches its peak.
        allow_cpu: Whether more than a billion parameters may be trained on the CPU.

    Raises:
        ConfigurationError: If an argument is out of its range; in `setup` and `configure_model`,
            before anything is loaded: if the checkpoint is missing or gated, there is no GPU, or
            too little memory.
        UnsupportedOperationError: If the checkpoint's architecture is none of the family.
    """

    def __init__(  # noqa: PLR0913 - these are the keys of a recipe
        self,
        checkpoint: str | None = LLAMA_2_7B,
        config: dict[str, Any] | None = None,
        task: Task = "causal_lm",
        num_labels: int = 2,
        quantization: Quantization = "nf4",
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        rank: int = 16,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: list[str] | None = None,
        rslora: bool = False,
        dora: bool = False,
        gradient_checkpointing: bool = True,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        allow_cpu: bool = False,
    ) -> None:
        super().__init__(learning_rate, weight_decay, betas, schedule, warmup_steps)
        self.save_hyperparameters()
        require_valid(self.hparams)
        self.task = task
        self.network: Any = None

    # ------------------------------------------------------------------ what is loaded
    @cached_property
    def base_config(self) -> Any:
        """The configuration of the base; read without its weights."""
        given = self.hparams["config"]
        if given is None:
            config = read_config(self.hparams["checkpoint"])
        else:
            from transformers import AutoConfig

            config = AutoConfig.for_model(**{"model_type": "llama", **given})
        require_family(config, self.hparams["checkpoint"])
        return config

    @property
    def limits(self) -> dict[str, int]:
        """The size of the vocabulary, the longest row and the number of classes."""
        config = self.base_config
        return {
            "vocab_size": config.vocab_size,
            "max_length": config.max_position_embeddings,
            "num_labels": self.hparams["num_labels"],
        }

    @override
    def configure_model(self) -> None:
        """Load the base onto the trainer's device and put adapters on it. Once; again is nothing.

        Raises:
            ConfigurationError: If there is no GPU, or too little memory.
        """
        if self.network is not None:
            return
        device = self._planned_device()
        require_gpu(self.base_config, device, allow_cpu=self.hparams["allow_cpu"])
        require_memory(self._workload(), device)
        base = self._load(device)
        base.config.use_cache = False
        self.network = adapted(base, self.hparams)
        if self.hparams["gradient_checkpointing"]:
            enable_checkpointing(base)
        for parameter in self.network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        # A model that is read is in evaluation mode: no dropout, no checkpointing.
        self.network.train(self.training)

    def _load(self, device: torch.device) -> Any:
        settings: dict[str, Any] = {
            "task": self.task,
            "quantization": self.hparams["quantization"],
            "dtype": _DTYPES[self.hparams["dtype"]],
            "device": device,
        }
        labels = self.hparams["num_labels"]
        if self.hparams["config"] is None:
            return load_base(self.hparams["checkpoint"], num_labels=labels, **settings)
        self.base_config.num_labels = labels
        return made_up_base(self.base_config, **settings)

    # ------------------------------------------------------------------ what is computed
    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute scores.

        Args:
            batch: ``input_ids`` [B, T], padded on the right; for a classification also
                ``attention_mask`` [B, T].

        Returns:
            Scores [B, T, vocabulary] of each next token, or [B, num_labels] of each class.
        """
        states = self._states(batch)
        if self.task == "causal_lm":
            return self._base.get_output_embeddings()(states)
        last = batch["attention_mask"].sum(dim=1) - 1
        pooled = states[torch.arange(len(states), device=states.device), last]
        head = self._base.score
        scores: Tensor = head(pooled.to(head.weight.dtype))
        return scores

    def losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute each example's own loss.

        Args:
            batch: What `forward` takes, and ``labels``: tokens [B, T], −100 where nothing is to be
                predicted, or classes [B].

        Returns:
            Cross entropies [B] in nats: the mean over the example's own target tokens.
        """
        if self.task == "causal_lm":
            head = self._base.get_output_embeddings().weight
            return frozen_head_losses(self._states(batch), head, batch["labels"])
        return self._class_losses(self(batch), batch["labels"])

    def _class_losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return F.cross_entropy(wide, labels, reduction="none")

    @override
    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Compute each example's own loss, or the scores of its classes.

        Args:
            batch: As for `losses`.
            batch_idx: Lightning's signature; not used.

        Returns:
            Losses [B], or scores [B, num_labels].
        """
        return self.losses(batch) if self.task == "causal_lm" else self(batch)

    @override
    def _evaluate(self, name: str, batch: Mapping[str, Tensor]) -> None:
        if self.task == "causal_lm":
            super()._evaluate(name, batch)
            return
        scores = self(batch)
        losses, right = self._class_losses(scores, batch["labels"]), scores.argmax(dim=1)
        accuracy = (right == batch["labels"]).float().mean()
        values = {f"{name}_loss": losses.mean(), f"{name}_accuracy": accuracy}
        self.log_dict(values, prog_bar=True, batch_size=len(scores), sync_dist=True)

    @property
    def _base(self) -> Any:
        return self._loaded().get_base_model()

    def _states(self, batch: Mapping[str, Tensor]) -> Tensor:
        # Padding stands on the right, where causal attention never looks: it needs no mask.
        states: Tensor = self._base.model(input_ids=batch["input_ids"]).last_hidden_state
        return states

    # ------------------------------------------------------------------ afterwards
    def save_adapter(self, folder: str) -> None:
        """Write the adapters as peft does; `peft.PeftModel.from_pretrained` reads them.

        Args:
            folder: Where to; made if it does not exist.
        """
        # The embeddings are frozen; "auto" would ask the hub whether they have changed.
        self._loaded().save_pretrained(folder, save_embedding_layers=False)

    def merge(self, dtype: Literal["bfloat16", "float32"] = "bfloat16") -> Any:
        """Add the adapters to the unquantised weights: a model that needs neither peft nor this.

        The checkpoint is read once more, in full precision and into the memory of the host.

        Args:
            dtype: Of the merged model.

        Returns:
            A model of transformers, on the CPU.

        Raises:
            ConfigurationError: If the base was made up.
        """
        base = load_base(
            self._checkpoint("to merge the adapters into"),
            task=self.hparams["task"],
            num_labels=self.hparams["num_labels"],
            quantization="none",
            dtype=_DTYPES[dtype],
            device=torch.device("cpu"),
        )
        with tempfile.TemporaryDirectory() as folder:
            self.save_adapter(folder)
            return merged(base, folder)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 64, temperature: float = 0.0
    ) -> list[str]:
        """Continue texts.

        Args:
            prompts: Beginnings, in the form that the model was trained on.
            max_new_tokens: Tokens to add at most.
            temperature: 0 takes the likeliest token; above, tokens are drawn, with torch's global
                generator.

        Returns:
            What was added to each, without the prompt.

        Raises:
            UnsupportedOperationError: If it is a classification, which has no head for tokens.
            ConfigurationError: If the base was made up and has no tokeniser.
        """
        if self.task != "causal_lm":
            raise UnsupportedOperationError(
                must="A model that continues texts has the task 'causal_lm'.",
                found=f"Its task is '{self.task}'.",
                cost="A head for classes names no token.",
                remedy="Call the module, or `predict`, for the scores of the classes.",
            )
        tokenizer = read_tokenizer(self._checkpoint("with a tokeniser"))
        training, network = self.training, self._loaded()
        self.eval()
        try:
            return [
                continued(network, tokenizer, prompt, max_new_tokens, temperature)
                for prompt in prompts
            ]
        finally:
            self.train(training)

    # ------------------------------------------------------------------ small print
    def _loaded(self) -> Any:
        if self.network is None:
            self.configure_model()
        return self.network

    def _checkpoint(self, why: str) -> str:
        if self.hparams["config"] is None:
            return str(self.hparams["checkpoint"])
        raise ConfigurationError(
            must=f"There is a checkpoint {why}.",
            found="A base with random weights, made up from `config`.",
            cost="Nothing of use could come out.",
            remedy="Give `checkpoint` instead of `config`.",
        )

    def _planned_device(self) -> torch.device:
        if self._trainer is not None:
            device: torch.device = self.trainer.strategy.root_device
            return device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _workload(self) -> Workload:
        data = getattr(self._trainer, "datamodule", None)
        values, targets = self.hparams, self.hparams["target_modules"]
        return Workload(
            config=self.base_config,
            quantization=values["quantization"],
            bytes_per_number=_DTYPES[values["dtype"]].itemsize,
            rank=values["rank"],
            targets=None if targets is None else tuple(targets),
            # Without data it is not known: then only the weights are certain.
            batch_size=getattr(data, "batch_size", 0),
            length=getattr(data, "max_length", 0),
            checkpointing=values["gradient_checkpointing"],
        )
