"""Text, image and audio in one Llama: the model of the PrivacyPreserveNet paper, reconstructed.

The paper (doi 10.20944/preprints202506.0157.v1) prints neither formulas nor sizes, so this is a
reading of its prose. Encoders turn an image and a sound into tokens, which stand before the text
in the decoder's input; a head gives classes or the next token. What makes it private is outside:
`DifferentialPrivacy` clips and noises its gradients, `AttentionNoise` disturbs its attention.

Legend: ``B`` examples, ``T`` tokens of text, ``P`` tokens of the other modalities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.models._trained import TrainedOnly, start_from
from lightning_privacy.models.base import Schedule, TextModule
from lightning_privacy.models.decoders import PretrainedDecoder, SmallDecoder
from lightning_privacy.models.encoders import (
    AudioSettings,
    ImageSettings,
    audio_encoder,
    image_encoder,
    refuse_other_widths,
)
from lightning_privacy.models.losses import example_losses, frozen_head_losses
from lightning_privacy.types import one_of, whole_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lightning_privacy.models._loading import Task

Modality = Literal["text", "image", "audio"]
Pooling = Literal["mean", "modalities", "last"]


class PrivacyPreserveNet(TrainedOnly, TextModule):
    """A Llama that reads any subset of text, image and audio.

    The loss of an example depends on that example alone. Three models of the paper are this class:
    the *Llama baseline* with ``modalities: [text]``, the *Non-PrivNet* with all of them, both
    trained in study mode; and *PrivacyPreserveNet* itself, trained privately.

    A batch has ``input_ids`` and ``attention_mask`` [B, T], padded on the right; ``image``
    [B, channels, height, width] and ``audio`` [B, features, time], each with a mask ``image_mask``,
    ``audio_mask`` [B] that is false where an example has none; and ``labels``, classes [B] or
    tokens [B, T] with −100 where nothing is to be predicted. What the model does not read may be
    left out.

    Args:
        modalities: What it reads; any of ``"text"``, ``"image"``, ``"audio"``.
        task: ``"classification"`` with a head for ``num_labels`` classes, or ``"causal_lm"``: the
            text is continued, given image and sound.
        num_labels: Classes; at least 2.
        decoder: A small decoder from random weights; the default.
        pretrained: A large one in its place, quantised and with adapters.
        image: Sizes of the image encoder.
        audio: Sizes of the audio encoder.
        pooling: What a class is read from: the ``"mean"`` of all states of the example; the mean of
            its ``"modalities"``, each of which weighs as much as another, however many tokens it
            has; or the ``"last"`` state.
        initial_weights: A checkpoint of this class, possibly with another task, whose encoders and
            decoder a fit starts from.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay.
        betas: Decay rates of AdamW's two moments.
        schedule: What the learning rate does after the warm-up, by optimizer step.
        warmup_steps: Optimizer steps until the learning rate reaches its peak.

    Raises:
        ConfigurationError: If an argument is out of its range; for a large decoder in
            `configure_model`: if there is no GPU, or too little memory.
    """

    _options: ClassVar[dict[str, str]] = {"max_length": "decoder.max_length"}

    def __init__(  # noqa: PLR0913 - these are the keys of a recipe
        self,
        modalities: list[Modality] = ["text", "image", "audio"],  # noqa: B006 - never written to
        task: Literal["causal_lm", "classification"] = "classification",
        num_labels: int = 10,
        decoder: SmallDecoder | None = None,
        pretrained: PretrainedDecoder | None = None,
        image: ImageSettings | None = None,
        audio: AudioSettings | None = None,
        pooling: Pooling = "mean",
        initial_weights: str | None = None,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(learning_rate, weight_decay, betas, schedule, warmup_steps)
        self.save_hyperparameters()
        _require_valid(modalities, task, num_labels, pooling, decoder, pretrained)
        self.modalities, self.task, self.pooling = tuple(modalities), task, pooling
        self._num_labels = num_labels
        self._decoder: SmallDecoder | PretrainedDecoder = pretrained or decoder or SmallDecoder()
        self._settings: dict[str, ImageSettings | AudioSettings] = {}
        self._settings |= {"image": image or ImageSettings(), "audio": audio or AudioSettings()}
        self.others = [name for name in ("image", "audio") if name in modalities]
        self._config = self._decoder.config(self.prefix)
        self._config.num_labels = num_labels
        self.network: Any = None
        if isinstance(self._decoder, SmallDecoder):
            self.network = self._decoder.build(self._config, task)
        self.encoders = nn.ModuleDict({name: self._encoder(name) for name in self.others})

    def _encoder(self, name: str) -> nn.Module:
        width, settings = self._config.hidden_size, self._settings[name]
        if isinstance(settings, ImageSettings):
            return image_encoder(settings, width)
        return audio_encoder(settings, width)

    @property
    def prefix(self) -> int:
        """P, how many tokens stand before the text."""
        return sum(self._settings[name].length for name in self.others)

    @property
    def limits(self) -> dict[str, int]:
        """The size of the vocabulary, the longest text and the number of classes."""
        return {
            "vocab_size": self._config.vocab_size,
            "max_length": self._config.max_position_embeddings - self.prefix,
            "num_labels": self._num_labels,
        }

    @override
    def configure_model(self) -> None:
        """Load a large decoder onto the trainer's device. Once; again is nothing.

        Raises:
            ConfigurationError: If there is no GPU, or too little memory.
        """
        if self.network is not None:
            return
        assert isinstance(self._decoder, PretrainedDecoder)
        device = self._planned_device()
        data = getattr(self._trainer, "datamodule", None)
        self._decoder.require_room(
            self._config,
            device,
            batch_size=getattr(data, "batch_size", 0),
            length=getattr(data, "max_length", 0) + self.prefix,
        )
        self.network = self._decoder.build(self._config, self._task(), device)
        # A model that is read is in evaluation mode: no dropout, no checkpointing.
        self.network.train(self.training)

    # ------------------------------------------------------------------ what is computed
    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute scores.

        Args:
            batch: As in the class, without labels.

        Returns:
            Scores [B, num_labels] of each class, or [B, T, vocabulary] of each next token.
        """
        states = self.states(batch)
        read = states[:, self.prefix :]
        if self.task == "classification":
            read = self._pooled(states, self._kept(batch)).to(_weight(self._head).dtype)
        scores: Tensor = self._head(read)
        return scores

    def losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute each example's own loss.

        Args:
            batch: As in the class.

        Returns:
            Cross entropies [B] in nats; of tokens, the mean over the example's own.
        """
        if self.task == "classification":
            return _class_losses(self(batch), batch["labels"])
        head = self._head.weight
        if head.requires_grad:
            return example_losses(self(batch), batch["labels"])
        return frozen_head_losses(self.states(batch)[:, self.prefix :], head, batch["labels"])

    def states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute the decoder's last states.

        Args:
            batch: As in the class, without labels.

        Returns:
            States [B, P + T, width]; T is 0 for a model that reads no text.
        """
        states: Tensor = self._base.model(inputs_embeds=self._inputs(batch)).last_hidden_state
        return states

    def _inputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        embed = self._base.get_input_embeddings()
        parts = [self.encoders[name](batch[name], batch[f"{name}_mask"]) for name in self.others]
        # Padding stands on the right, where causal attention never looks: it needs no mask.
        parts += [embed(batch["input_ids"])] if "text" in self.modalities else []
        dtype = parts[-1].dtype
        return torch.cat([part.to(dtype) for part in parts], dim=1)

    def _kept(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """``[B, N]`` of each modality: which places are the example's own."""
        parts = [
            batch[f"{name}_mask"][:, None].expand(-1, self._settings[name].length)
            for name in self.others
        ]
        return parts + ([batch["attention_mask"].bool()] if "text" in self.modalities else [])

    def _pooled(self, states: Tensor, parts: list[Tensor]) -> Tensor:
        if self.pooling == "last":
            kept = torch.cat(parts, dim=1)
            places = torch.arange(kept.shape[1], device=kept.device)
            last = (kept * places).argmax(dim=1)
            return states[torch.arange(len(states), device=states.device), last]
        if self.pooling == "modalities":
            parts = [_shares(part) for part in parts]
        shares = _shares(torch.cat(parts, dim=1))
        return (states * shares[..., None].to(states.dtype)).sum(dim=1)

    @override
    def _evaluate(self, name: str, batch: Mapping[str, Tensor]) -> None:
        if self.task == "causal_lm":
            super()._evaluate(name, batch)
            return
        scores = self(batch)
        losses = _class_losses(scores, batch["labels"])
        accuracy = (scores.argmax(dim=1) == batch["labels"]).float().mean()
        values = {f"{name}_loss": losses.mean(), f"{name}_accuracy": accuracy}
        self.log_dict(values, prog_bar=True, batch_size=len(scores), sync_dist=True)

    @override
    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Compute the scores of the classes, or each example's own loss.

        Args:
            batch: As in the class.
            batch_idx: Lightning's signature; not used.

        Returns:
            Scores [B, num_labels], or losses [B].
        """
        return self.losses(batch) if self.task == "causal_lm" else self(batch)

    @torch.no_grad()
    def generate(
        self, batch: Mapping[str, Tensor], max_new_tokens: int, end_id: int | None = None
    ) -> list[list[int]]:
        """Continue texts, given image and sound; always the likeliest token.

        Args:
            batch: As in the class, without labels; the text is what is given.
            max_new_tokens: Tokens to add at most.
            end_id: A token behind which nothing is added.

        Returns:
            The tokens that were added to each example.

        Raises:
            ConfigurationError: If the model has classes.
        """
        if self.task != "causal_lm":
            raise ConfigurationError(
                must="A model that continues texts has the task 'causal_lm'.",
                found=f"The task '{self.task}'.",
                cost="A head of classes knows no next token.",
                remedy="Make the model with `task: causal_lm`.",
            )
        training = self.training
        self.eval()
        try:
            rows = range(len(batch["input_ids"]))
            return [self._continued(batch, row, max_new_tokens, end_id) for row in rows]
        finally:
            self.train(training)

    def _continued(
        self, batch: Mapping[str, Tensor], row: int, most: int, end_id: int | None
    ) -> list[int]:
        own = {name: value[row : row + 1] for name, value in batch.items()}
        length = int(own["attention_mask"].sum())
        own["input_ids"] = own["input_ids"][:, :length]
        made: list[int] = []
        while len(made) < most and (not made or made[-1] != end_id):
            next_id = self(own)[:, -1].argmax(dim=-1, keepdim=True)
            made.append(int(next_id))
            own["input_ids"] = torch.cat([own["input_ids"], next_id], dim=1)
        return made

    # ------------------------------------------------------------------ small print
    @override
    def setup(self, stage: str) -> None:
        """Refuse data that do not fit the model.

        Args:
            stage: Lightning's stage; checked in every stage.

        Raises:
            ConfigurationError: If the data lack a modality that the model reads, have it in another
                number of channels, or are larger than the model allows.
        """
        super().setup(stage)
        if stage == "fit" and self.hparams["initial_weights"] is not None:
            start_from(self, self.hparams["initial_weights"], ("network.score", "network.lm_head"))
        data = getattr(self.trainer, "datamodule", None)
        given = getattr(data, "modalities", self.modalities)
        missing = [name for name in self.modalities if name not in given]
        if missing:
            raise ConfigurationError(
                must="The data have every modality that the model reads.",
                found=f"They have {', '.join(given)}, and the model reads {', '.join(missing)}.",
                cost="Every example would stand there without it.",
                remedy="Add it to `data.modalities`, or take it out of `model.modalities`.",
            )
        if data is not None and hasattr(data, "preprocessing"):
            read = {str(name): self._settings[name] for name in self.others}
            refuse_other_widths(read, data.preprocessing)

    @property
    def _base(self) -> Any:
        self.configure_model()
        network = self.network
        return network.get_base_model() if hasattr(network, "peft_config") else network

    @property
    def _head(self) -> Any:
        base = self._base
        return base.score if self.task == "classification" else base.get_output_embeddings()

    def _task(self) -> Task:
        return "causal_lm" if self.task == "causal_lm" else "classification"

    def _planned_device(self) -> torch.device:
        if self._trainer is not None:
            device: torch.device = self.trainer.strategy.root_device
            return device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _shares(weights: Tensor) -> Tensor:
    """Of each place in its row's sum; zeros stay zeros."""
    total = weights.sum(dim=1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)


def _class_losses(scores: Tensor, labels: Tensor) -> Tensor:
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(wide, labels, reduction="none")


def _weight(head: nn.Module) -> Tensor:
    # peft keeps the frozen head beside the trained one.
    trained = [p for p in head.parameters() if p.requires_grad]
    return trained[0] if trained else next(head.parameters())


def _require_valid(
    modalities: Sequence[str],
    task: str,
    num_labels: int,
    pooling: str,
    decoder: SmallDecoder | None,
    pretrained: PretrainedDecoder | None,
) -> None:
    cost, remedy = "There would be no such model.", "Give such a value."
    for name in modalities:
        one_of("modalities", name, get_args(Modality), cost=cost, remedy=remedy)
    one_of("task", task, ("causal_lm", "classification"), cost=cost, remedy=remedy)
    one_of("pooling", pooling, get_args(Pooling), cost=cost, remedy=remedy)
    whole_number("num_labels", num_labels, at_least=2, cost=cost, remedy=remedy)
    texts = "text" in modalities or task == "classification"
    if not modalities or len(set(modalities)) < len(modalities) or not texts:
        raise ConfigurationError(
            must="A model reads at least one modality, each once, and continues texts it reads.",
            found=f"modalities={list(modalities)}, task={task!r}.",
            cost=cost,
            remedy="Give for instance modalities: [text, image, audio].",
        )
    if decoder is not None and pretrained is not None:
        raise ConfigurationError(
            must="A model has one decoder.",
            found="Both `decoder` and `pretrained` are given.",
            cost="One of them would be left aside silently.",
            remedy="Leave one of them out.",
        )
