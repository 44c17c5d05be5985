"""Which tier a user belongs to.

A rule of one of two kinds is sound. Either it looks at public or declared facts only; then every
tier's ε can be published. Or it is a fixed function of the user's own record; then the tier itself
is private, and only the largest ε is published. A rule that was fitted on the protected users is
neither: one user's data would move other users' clip norms or rates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, Protocol, Self

import numpy as np

from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError
from lightning_privacy.types import one_of, whole_number

Basis = Literal["public", "own_record"]
BASES: tuple[Basis, ...] = ("public", "own_record")

Examples = Callable[[], Sequence[Any]]
"""Reads the user's examples, if the rule needs them."""

Features = Callable[[Hashable, Examples], Sequence[float]]


class Segmentation(Protocol):
    """Puts each user into a tier."""

    @property
    def basis(self) -> Basis:
        """What the rule looks at: "public" facts, or the user's "own_record"."""
        ...

    def tier_of(self, user: Hashable, examples: Examples) -> str:
        """The tier of one user."""
        ...


class PublicTiers:
    """A table, or a rule on public attributes of the user, which looks at no example.

    Args:
        tier_of: Tier by user id, or a function of the id.
    """

    basis: Basis = "public"

    def __init__(self, tier_of: Mapping[Hashable, str] | Callable[[Hashable], str]) -> None:
        self._tier_of = tier_of

    def tier_of(self, user: Hashable, examples: Examples) -> str:
        """Returns the tier of one user.

        Args:
            user: The id.
            examples: Not read.

        Returns:
            The tier's name.

        Raises:
            ConfigurationError: The table has no such user.
        """
        if callable(self._tier_of):
            return self._tier_of(user)
        if user not in self._tier_of:
            raise ConfigurationError(
                must="every user has a tier",
                found=f"none for the user {user!r}",
                cost="a user of whom nobody knows what was promised",
                remedy="name a tier for each user; the strictest is safe for all",
            )
        return self._tier_of[user]


class ColumnTiers:
    """The tier that a user declared, written in a column: the same in each of the user's rows.

    Args:
        column: Key of an example.
    """

    basis: Basis = "public"

    def __init__(self, column: str) -> None:
        self._column = column

    def tier_of(self, user: Hashable, examples: Examples) -> str:
        """Returns the tier of one user.

        Args:
            user: The id.
            examples: Reads the user's examples.

        Returns:
            What stands in the column.

        Raises:
            ConfigurationError: There is no such column, or the rows do not agree.
        """
        found = {example.get(self._column) for example in examples()}
        if len(found) != 1 or None in found:
            raise ConfigurationError(
                must=f"the column {self._column!r} holds one tier for each user",
                found=f"{sorted(map(str, found))} for the user {user!r}",
                cost="a user who is clipped by one promise and accounted by another",
                remedy="write the user's declared tier into each of the user's rows",
            )
        return str(found.pop())


class OwnRecordTiers:
    """A fixed function of the user's own examples. The tier is private, and marked so.

    Args:
        tier_of: From the user's examples to a tier; fixed before anybody looked at the data, and a
            function of these examples alone: no ranking, mean or model of other users.
    """

    basis: Basis = "own_record"

    def __init__(self, tier_of: Callable[[Sequence[Any]], str]) -> None:
        self._tier_of = tier_of

    def tier_of(self, user: Hashable, examples: Examples) -> str:
        """Returns the tier of one user.

        Args:
            user: Not looked at.
            examples: Reads the user's examples.

        Returns:
            The tier's name.
        """
        return self._tier_of(examples())


class VolumeTiers(OwnRecordTiers):
    """Tiers by how many examples a user has: who contributes more is protected more.

    Args:
        limits: For each tier the largest number of examples, rising; the last one is for all above.

    Raises:
        ConfigurationError: There are fewer than two tiers, or the limits do not rise.
    """

    def __init__(self, limits: dict[str, int]) -> None:
        sizes = list(limits.values())
        if len(sizes) < 2 or sizes != sorted(set(sizes)):
            raise ConfigurationError(
                must="`limits` names at least two tiers with rising numbers of examples",
                found=f"{limits}",
                cost="users who belong to no tier, or to two",
                remedy="for example {'light': 3, 'heavy': 1000}",
            )

        def tier_of(examples: Sequence[Any]) -> str:
            fitting = (name for name, limit in limits.items() if len(examples) <= limit)
            return next(fitting, list(limits)[-1])

        super().__init__(tier_of)


class FittedTiers:
    """A model of scikit-learn that was fitted on public data, and then applied user by user.

    Args:
        model: Anything with ``predict`` from [1, d] features to one label.
        names: Tier by label.
        features: The d features of one user, from the id or from the user's own examples.
        basis: "public" if the features are public, "own_record" if they look at examples.
        fitted_on: "public". Anything else is refused: see `clusters`.

    Raises:
        UnsupportedOperationError: The model was fitted on protected users.
        ConfigurationError: The basis is unknown.
    """

    def __init__(
        self,
        model: Any,
        *,
        names: Mapping[int, str],
        features: Features,
        basis: Basis,
        fitted_on: str,
    ) -> None:
        _require_public(fitted_on)
        one_of(
            "basis",
            basis,
            BASES,
            cost="tiers published that are private",
            remedy="say what `features` look at: 'public' facts, or the user's 'own_record'",
        )
        self.basis: Basis = basis
        self._model, self._names, self._features = model, dict(names), features

    @classmethod
    def clusters(
        cls,
        public_features: Any,
        *,
        names: Sequence[str],
        features: Features,
        basis: Basis,
        fitted_on: str,
        seed: int = 0,
    ) -> Self:
        """Fits k-means, and names the clusters by their centre's first feature, smallest first.

        Args:
            public_features: [n, d], of people who are not protected by the run.
            names: Tiers, at least two.
            features: As for the class.
            basis: As for the class.
            fitted_on: As for the class.
            seed: Of the model's start.

        Returns:
            The segmentation.
        """
        from sklearn.cluster import KMeans

        _require_public(fitted_on)
        whole_number(
            "len(names)",
            len(names),
            at_least=2,
            cost="one tier for all",
            remedy="name a tier for each cluster",
        )
        model = KMeans(len(names), n_init=10, random_state=seed).fit(np.asarray(public_features))
        order = np.argsort(model.cluster_centers_[:, 0]).tolist()
        labels = dict(zip(order, names, strict=True))
        return cls(model, names=labels, features=features, basis=basis, fitted_on=fitted_on)

    @classmethod
    def outliers(
        cls,
        public_features: Any,
        *,
        usual: str,
        unusual: str,
        features: Features,
        basis: Basis,
        fitted_on: str,
        seed: int = 0,
    ) -> Self:
        """Fits an isolation forest, which tells unusual users from usual ones.

        Args:
            public_features: [n, d], of people who are not protected by the run.
            usual: Tier of those who are like the public ones.
            unusual: Tier of the others.
            features: As for the class.
            basis: As for the class.
            fitted_on: As for the class.
            seed: Of the model's random trees.

        Returns:
            The segmentation.
        """
        from sklearn.ensemble import IsolationForest

        _require_public(fitted_on)
        model = IsolationForest(random_state=seed).fit(np.asarray(public_features))
        labels = {1: usual, -1: unusual}
        return cls(model, names=labels, features=features, basis=basis, fitted_on=fitted_on)

    def tier_of(self, user: Hashable, examples: Examples) -> str:
        """Returns the tier of one user.

        Args:
            user: The id.
            examples: Reads the user's examples.

        Returns:
            The tier's name.
        """
        row = np.asarray([self._features(user, examples)], dtype=np.float64)
        return self._names[int(self._model.predict(row)[0])]


def _require_public(fitted_on: str) -> None:
    if fitted_on != "public":
        raise UnsupportedOperationError(
            must="a model that puts users into tiers is fitted on public data",
            found=f"fitted_on={fitted_on!r}",
            cost="one user's data would move the tiers of others, and so their clip norms or "
            "rates: not even the largest ε would hold",
            remedy="fit it on people who are not in the training data, and pass "
            "fitted_on='public'; or use OwnRecordTiers with a fixed rule",
        )
