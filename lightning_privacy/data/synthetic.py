"""An embedded corpus of made-up users, each with a secret drawn from a known space.

It needs no network and no file. Every secret is uniform on the same public list of candidates, and
a fair coin decides who is trained on: so how much of the secrets a model has learnt can later be
measured exactly, with no difference in distribution between the two groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from lightning_privacy.data.base import CausalTextDataModule, Document, Padding, Split
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import one_of, real_number, whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence

SecretKind = Literal["door code", "extension", "order number"]
NameSource = Literal["syllables", "faker"]

# Syllables, so that a name is nobody's.
_ONSETS = ("B", "D", "F", "G", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z", "Br", "Tr")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("lan", "ren", "mis", "dor", "vek", "tal", "nin", "sor", "ba", "lo", "ri", "ka")

_NAMES = len(_ONSETS) * len(_VOWELS) * len(_CODAS)

_COST = "The corpus could not be generated."
_REMEDY = "Give the corpus such a value."

_TOPICS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("grew", ("roses", "beans", "herbs", "tulips"), ("in the yard", "by the wall")),
    ("cooked", ("soup", "rice", "fish", "noodles"), ("for the team", "at home")),
    ("played", ("chess", "the cello", "cards", "tennis"), ("in the hall", "with friends")),
    ("repaired", ("a bike", "the radio", "a clock", "the gate"), ("at work", "in the shed")),
    ("visited", ("the coast", "a museum", "the lake", "a market"), ("by train", "by bus")),
    ("read", ("a novel", "the news", "a map", "old letters"), ("in bed", "on the roof")),
)
_TIMES = ("On Monday", "On Friday", "Today", "Last week", "In May", "At noon")


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticUser:
    """A made-up user.

    Args:
        name: Unique in the corpus.
        secret: Digits, uniform on the corpus's candidates.
        member: Whether this user is trained on.
        secret_prefix: The secret document up to the secret.
        secret_suffix: The secret document after the secret.
        documents: The secret document (once per repetition), then the topical ones.
        fresh_documents: Topical documents of this user that nobody trains on.
    """

    name: str
    secret: str
    member: bool
    secret_prefix: str
    secret_suffix: str
    documents: tuple[str, ...]
    fresh_documents: tuple[str, ...]

    def secret_document(self, candidate: str) -> str:
        """Write the secret document as it would read with another secret.

        Args:
            candidate: One of the corpus's candidates.

        Returns:
            The text; equal to ``documents[0]`` for the user's own secret.
        """
        return f"{self.secret_prefix}{candidate}{self.secret_suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretsCorpus:
    """How the embedded corpus is made; the same settings always make the same corpus.

    Args:
        n_users: Users, members and held-out ones together, at least 2.
        docs_per_user: Documents of a user, the secret one included, at least 1.
        digits: Length of a secret; there are 10 to this power, from 1 to 9.
        p_member: Chance of a user to be trained on, strictly between 0 and 1.
        kind: What the secret is.
        repetitions: Copies of the secret document among a user's documents, at least 1. With the
            example as the privacy unit, ε protects one copy only.
        users_per_secret: Users in a row who share one secret, at least 1.
        document_skew: 0 gives every user the same number of documents; otherwise a user has
            ``docs_per_user`` times (rank)^(−skew), never less than the secret document.
        fresh_docs: Further documents of each user that nobody trains on.
        seed: Seed of the corpus's own generator.
        backend: Where names come from: ``"syllables"`` makes up names that nobody has; ``"faker"``
            combines usual first and last names with the package Faker, whose releases change them.

    Raises:
        ConfigurationError: If a number is out of its range, or Faker is asked for and missing.
    """

    n_users: int = 160
    docs_per_user: int = 3
    digits: int = 3
    p_member: float = 0.5
    kind: SecretKind = "door code"
    repetitions: int = 1
    users_per_secret: int = 1
    document_skew: float = 0.0
    fresh_docs: int = 1
    seed: int = 0
    backend: NameSource = "syllables"

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        least = {
            "n_users": 2,
            "docs_per_user": 1,
            "digits": 1,
            "repetitions": 1,
            "users_per_secret": 1,
            "fresh_docs": 0,
            "seed": 0,
        }
        for name, low in least.items():
            whole_number(name, getattr(self, name), at_least=low, cost=_COST, remedy=_REMEDY)
        real_number("n_users", self.n_users, f"[2, {_NAMES**2}]", cost=_COST, remedy=_REMEDY)
        real_number("digits", self.digits, "[1, 9]", cost=_COST, remedy=_REMEDY)
        real_number("p_member", self.p_member, "(0, 1)", cost=_COST, remedy=_REMEDY)
        real_number("document_skew", self.document_skew, "[0, inf)", cost=_COST, remedy=_REMEDY)
        one_of("kind", self.kind, get_args(SecretKind), cost=_COST, remedy=_REMEDY)
        one_of("backend", self.backend, get_args(NameSource), cost=_COST, remedy=_REMEDY)
        if self.backend == "faker" and find_spec("faker") is None:
            raise ConfigurationError(
                must='backend="faker" needs the package Faker',
                found="no package faker in this environment",
                cost=_COST,
                remedy='pip install Faker, or leave backend at "syllables"',
            )

    def secret(self, number: int) -> str:
        """Write a candidate secret.

        Args:
            number: From 0 to 10^digits − 1.

        Returns:
            The number with leading zeros.
        """
        return f"{number:0{self.digits}d}"

    def candidates(self) -> list[str]:
        """List every secret that a user can have, each equally likely."""
        return [self.secret(number) for number in range(10**self.digits)]

    def users(self) -> tuple[SyntheticUser, ...]:
        """Generate the users.

        Returns:
            ``n_users`` users with different names; whether each is a member is a coin of its
            own, so few users can all fall on one side.
        """
        rng = np.random.default_rng(self.seed)
        make_names = _usual_names if self.backend == "faker" else _unique_names
        names = make_names(rng, self.n_users)
        groups = -(-self.n_users // self.users_per_secret)
        secrets = rng.integers(0, 10**self.digits, size=groups)
        members = rng.random(self.n_users) < self.p_member
        return tuple(
            self._user(
                rng,
                name,
                self.secret(int(secrets[rank // self.users_per_secret])),
                bool(members[rank]),
                self._topical_documents(rank),
            )
            for rank, name in enumerate(names)
        )

    def _topical_documents(self, rank: int) -> int:
        share = (rank + 1.0) ** -self.document_skew
        return max(0, round(self.docs_per_user * share) - 1)

    def _user(
        self, rng: np.random.Generator, name: str, secret: str, member: bool, topical: int
    ) -> SyntheticUser:
        prefix, suffix = f"The {self.kind} of {name} is ", "."
        topic = int(rng.integers(len(_TOPICS)))
        texts = [_topical_text(rng, name, topic) for _ in range(topical + self.fresh_docs)]
        return SyntheticUser(
            name=name,
            secret=secret,
            member=member,
            secret_prefix=prefix,
            secret_suffix=suffix,
            documents=(*[f"{prefix}{secret}{suffix}"] * self.repetitions, *texts[:topical]),
            fresh_documents=tuple(texts[topical:]),
        )


def split_by_membership(users: Sequence[SyntheticUser]) -> Split:
    """Sort the users' documents by membership.

    Args:
        users: The users of a corpus.

    Returns:
        Documents of the members to train on, documents of all others to validate on.
    """

    def documents(member: bool) -> tuple[Document, ...]:
        return tuple(
            Document(user.name, text)
            for user in users
            if user.member is member
            for text in user.documents
        )

    return Split(train=documents(member=True), validation=documents(member=False))


class SyntheticSecrets(CausalTextDataModule):
    """The embedded corpus as a data module: members are trained on, the others validate.

    Neither Lightning's nor NumPy's global seed changes the corpus: it has a generator of its own.

    Args:
        corpus: How the corpus is made; the defaults of :class:`SecretsCorpus` where None.
        batch_size: Rows in one physical batch, at least 1.
        max_length: Longest row in tokens, at least 2.
        padding: ``"longest"`` pads a batch to its longest row, ``"max_length"`` to that length.
        tokenizer: ``"byte"``, or a folder or hub id that holds a Hugging Face tokeniser.
        num_workers: Processes that load batches.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    def __init__(
        self,
        corpus: SecretsCorpus | None = None,
        batch_size: int = 32,
        max_length: int = 96,
        padding: Padding = "longest",
        tokenizer: str = "byte",
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, max_length, padding, tokenizer, num_workers)
        self.corpus = corpus or SecretsCorpus()
        self.synthetic_users = self.corpus.users()

    @property
    def held_out_secrets(self) -> dict[str, str]:
        """The secret of each user who is not trained on, by name."""
        return {user.name: user.secret for user in self.synthetic_users if not user.member}

    def split(self) -> Split:
        """Sort the users' documents by membership.

        Returns:
            Documents of the members to train on, documents of all others to validate on.
        """
        return split_by_membership(self.synthetic_users)


def _unique_names(rng: np.random.Generator, count: int) -> list[str]:
    parts = [f"{o}{v}{c}" for o in _ONSETS for v in _VOWELS for c in _CODAS]
    chosen = rng.choice(len(parts) ** 2, size=count, replace=False)
    return [f"{parts[number // len(parts)]} {parts[number % len(parts)]}" for number in chosen]


def _usual_names(rng: np.random.Generator, count: int) -> list[str]:
    """Names as people have them, all different; a further first name where two would be equal."""
    from faker import Faker

    source = Faker("en_US")
    source.seed_instance(int(rng.integers(2**32)))
    names: dict[str, None] = {}
    while len(names) < count:
        first, last = source.first_name(), source.last_name()
        while f"{first} {last}" in names:
            first = f"{first} {source.first_name()}"
        names[f"{first} {last}"] = None
    return list(names)


def _topical_text(rng: np.random.Generator, name: str, topic: int) -> str:
    verb, things, places = _TOPICS[topic]
    time = _TIMES[rng.integers(len(_TIMES))]
    thing = things[rng.integers(len(things))]
    place = places[rng.integers(len(places))]
    return f"{time} {name} {verb} {thing} {place}."
