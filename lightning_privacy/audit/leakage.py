"""What a finished model leaks: all attacks that need no shadow models, on a module and its data.

None of these figures is covered by ε.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_privacy.audit.attacks.blind import BlindBaseline, blind_baseline
from lightning_privacy.audit.attacks.texts import adapters_off, evaluating, score_texts
from lightning_privacy.audit.membership import MembershipFigures, membership_figures
from lightning_privacy.audit.users import (
    UserInference,
    users_by_fresh_texts,
    users_by_their_rows,
)
from lightning_privacy.data import ByteTokenizer, SyntheticSecrets, TextCorpus
from lightning_privacy.data.base import DocumentDataModule
from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError
from lightning_privacy.metrics import Exposure
from lightning_privacy.metrics.functional import candidate_log_likelihoods
from lightning_privacy.types import whole_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_privacy.data import SecretsCorpus
    from lightning_privacy.data.synthetic import SyntheticUser

Reference = nn.Module | Literal["adapters"] | None
# A trie of this many codes is scored in some thousand short rows.
_MOST_CANDIDATES = 10_000
# With fewer texts or users nothing can be said without the model.
_FEWEST = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SecretFigures:
    """How much of the secrets of an embedded corpus can be read off a model.

    Attributes:
        inside: Mean exposure in bits of members' secrets.
        outside: The same of secrets that the model never saw; 1.44 on average.
        largest: What it would be at most.
        extracted: Share of members whose secret comes first among all candidates.
        users: How many users of each kind were looked at, at most.
    """

    inside: float
    outside: float
    largest: float
    extracted: float
    users: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Leakage:
    """What attacks on a model found. Not covered by ε.

    Attributes:
        membership: The figures of each attack.
        scores: ``[N]`` of each attack, by name.
        member: ``[N]`` whether each was trained on.
        secrets: What can be read off, where the secrets are known.
        blind: What can be told without the model, where the data are texts.
        users: How well users were told apart, where the data say whose each example is.
    """

    membership: tuple[MembershipFigures, ...]
    scores: dict[str, Tensor]
    member: Tensor
    secrets: SecretFigures | None = None
    blind: BlindBaseline | None = None
    users: UserInference | None = None


def measure_leakage(
    module: Any,
    data: Any,
    *,
    reference: Reference = "adapters",
    rows: int = 512,
    users: int = 64,
    blind: bool = True,
) -> Leakage:
    """Attack a model with its own training data and the validation data of the same split.

    Text models are attacked by every score of `score_texts`; others by their loss, and by how far
    it fell against the reference, where the module has a method ``losses(batch)`` that returns
    ``[B]``. On the embedded corpora the exposure of the secrets is measured, too. Where the data
    say whose each example is, by ``users`` on their data sets, users are attacked by the mean over
    their examples; on the embedded corpora by texts that nobody trained on.

    Args:
        module: The model under attack, on the device where it is to run.
        data: A data module with loaders for training and validation.
        reference: The model before fine-tuning; "adapters" switches the adapters of PEFT off; None
            leaves the ratio out.
        rows: Most examples of each side.
        users: Most users of each side whose secrets are looked at.
        blind: Whether to try without the model first; warns of a split that was not random.

    Returns:
        What was found.

    Raises:
        UnsupportedOperationError: The loss of single examples cannot be had.
        ConfigurationError: There are no training or no validation data, or ``rows`` is below 2.
    """
    whole_number(
        "rows",
        rows,
        at_least=2,
        cost="an attack on nothing",
        remedy="leave it out, or take some hundreds: fewer show little",
    )
    loaders = _loaders(data)
    chosen = [_chosen(loader, rows, seed) for seed, loader in enumerate(loaders)]
    sides = [
        _scores(module, loader, reference, places)
        for loader, places in zip(loaders, chosen, strict=True)
    ]
    inside, outside = sides
    counts = [len(next(iter(side.values()))) for side in sides]
    member = torch.arange(sum(counts)) < counts[0]
    scores = {n: torch.cat([inside[n], outside[n]]) for n in inside if n in outside}
    found = tuple(membership_figures(name, values, member) for name, values in scores.items())
    return Leakage(
        membership=found,
        scores=scores,
        member=member,
        secrets=secret_figures(module, data, users=users),
        blind=_blind(data, rows) if blind else None,
        users=_users(module, data, reference, rows, (loaders, chosen, sides)),
    )


def secret_figures(module: Any, data: Any, *, users: int = 64) -> SecretFigures | None:
    """Measure the exposure of the secrets of an embedded corpus.

    Args:
        module: The model under attack.
        data: Its data module.
        users: Most users of each side.

    Returns:
        The figures; None where the data have no known secrets, the model does not read bytes, or
        there are too many candidates.
    """
    corpus = _corpus(data)
    readable = isinstance(getattr(data, "tokenizer", None), ByteTokenizer)
    if corpus is None or not readable or 10**corpus.digits > _MOST_CANDIDATES:
        return None
    everybody = corpus.users()
    sides = [[u for u in everybody if u.member is inside][:users] for inside in (True, False)]
    candidates = corpus.candidates()
    bits, first = [], 0.0
    for number, side in enumerate(sides):
        metric = Exposure()
        for user in side:
            logs = _candidate_logs(module, data.tokenizer, user, candidates)
            own = candidates.index(user.secret)
            metric.update(logs[None], torch.tensor([own]))
            first += number == 0 and int(logs.argmax()) == own
        bits.append(float(metric.compute()) if side else math.nan)
    return SecretFigures(
        inside=bits[0],
        outside=bits[1],
        largest=math.log2(len(candidates)),
        extracted=first / max(1, len(sides[0])),
        users=max(map(len, sides)),
    )


def _candidate_logs(
    module: Any, tokenizer: Any, user: SyntheticUser, candidates: Sequence[str]
) -> Tensor:
    start = tokenizer.encode_pair(user.secret_prefix, "")[0]
    device = _device(module)

    def next_token(prefixes: Sequence[tuple[int, ...]]) -> Tensor:
        ids = torch.tensor([[*start, *prefix] for prefix in prefixes], device=device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with evaluating(module):
            logits: Tensor = module(batch)
        return logits[:, -1].float().log_softmax(-1)

    return candidate_log_likelihoods(next_token, [tuple(c.encode()) for c in candidates])


def _users(
    module: Any, data: Any, reference: Reference, rows: int, scored: tuple[Any, Any, Any]
) -> UserInference | None:
    corpus = _corpus(data)
    if corpus is not None and corpus.fresh_docs:
        return users_by_fresh_texts(module, data, reference, corpus.users(), rows)
    loaders, chosen, sides = scored
    if any(getattr(loader.dataset, "users", None) is None for loader in loaders):
        return None
    name = "ratio" if all("ratio" in side for side in sides) else "loss"
    names = [
        [str(loader.dataset.users[row]) for row in places]
        for loader, places in zip(loaders, chosen, strict=True)
    ]
    return users_by_their_rows([side[name] for side in sides], names)


def _corpus(data: Any) -> SecretsCorpus | None:
    if isinstance(data, SyntheticSecrets):
        return data.corpus
    if isinstance(data, TextCorpus) and data.file is None:
        return data.embedded
    return None


def _loaders(data: Any) -> tuple[Any, Any]:
    data.setup("fit")
    loaders = data.train_dataloader(), data.val_dataloader()
    if any(getattr(loader, "dataset", None) is None for loader in loaders):
        raise ConfigurationError(
            must="members and others each come from one loader with a data set",
            found=", ".join(type(loader).__name__ for loader in loaders),
            cost="nothing to compare the members with",
            remedy="give the data module a train_dataloader and a val_dataloader of one random "
            "split",
        )
    return loaders


def _chosen(loader: Any, rows: int, seed: int) -> list[int]:
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(seed))
    return order[:rows].tolist()


def _batches(loader: Any, rows: Sequence[int]) -> Iterator[Any]:
    size = loader.batch_size or 1
    for start in range(0, len(rows), size):
        yield loader.collate_fn([loader.dataset[row] for row in rows[start : start + size]])


def _scores(
    module: Any, loader: Any, reference: Reference, rows: Sequence[int]
) -> dict[str, Tensor]:
    if _is_text(next(_batches(loader, rows[:1]))):
        return score_texts(module, _batches(loader, rows), reference=reference)
    score = -_losses(module, loader, rows)
    scores, before = {"loss": score}, None
    if isinstance(reference, nn.Module):
        before = _losses(reference, loader, rows)
    elif reference == "adapters":
        with adapters_off(module) as found:
            before = _losses(module, loader, rows) if found else None
    return scores if before is None else {**scores, "ratio": score + before}


def _is_text(batch: Any) -> bool:
    return (
        isinstance(batch, dict)
        and "input_ids" in batch
        and "labels" in batch
        and batch["labels"].shape == batch["input_ids"].shape
    )


def _losses(module: Any, loader: Any, rows: Sequence[int]) -> Tensor:
    if not callable(getattr(module, "losses", None)):
        raise UnsupportedOperationError(
            must="the loss of a single example can be computed",
            found=f"no method `losses(batch)` on {type(module).__name__}",
            cost="no attack",
            remedy="give the module a method losses(batch) -> Tensor [B]; while training, "
            "LeakageMonitor does without",
        )
    device = _device(module)
    found = []
    for batch in _batches(loader, rows):
        with evaluating(module):
            found.append(module.losses(_moved(batch, device)).double().cpu())
    return torch.cat(found)


def _moved(batch: Any, device: torch.device) -> Any:
    from lightning.fabric.utilities import move_data_to_device

    return move_data_to_device(batch, device)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _blind(data: Any, rows: int) -> BlindBaseline | None:
    if not isinstance(data, DocumentDataModule):
        return None
    split = data.split()
    sides = split.train[: 4 * rows], split.validation[: 4 * rows]
    if any(len(side) < _FEWEST or len({d.user for d in side}) < _FEWEST for side in sides):
        return None
    members, others = ([document.text for document in side] for side in sides)
    users = [document.user for side in sides for document in side]
    return blind_baseline(members, others, groups=users)
