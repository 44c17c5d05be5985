"""Whose example is it? The rows of a data set, grouped by the users they belong to.

A guarantee for users holds for what this index calls a user. So it refuses what would split a
person into several units, or leave rows to nobody.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.types import USER_SAMPLINGS, one_of, whole_number

if TYPE_CHECKING:
    from collections.abc import Iterator

UserIds = str | Callable[[Any], Hashable] | Sequence[Hashable]
"""A column or attribute of the data set, a function of an example, or one id for each row."""

_ATTRIBUTE = "users"
_SEVERAL = (list, set, frozenset, dict, np.ndarray)


class UserIndex:
    """The rows of each user, in the order of the data set.

    Args:
        ids: The user of each row: any hashable; equal ids are one user.

    Attributes:
        count: Number of users (private under add-or-remove).
        size: Number of rows.
        ids: Each user's id, in the order of their first rows.

    Raises:
        ConfigurationError: An id is missing, unhashable or equal to itself only, a row has several
            users, two ids differ in what nobody sees, or there are fewer than two users.
    """

    def __init__(self, ids: Iterable[Hashable]) -> None:
        numbers: dict[Hashable, int] = {}
        units = np.array(
            [numbers.setdefault(_checked(row, key), len(numbers)) for row, key in enumerate(ids)],
            dtype=np.int64,
        )
        self.ids = tuple(numbers)
        self.count, self.size = len(numbers), len(units)
        _refuse_too_few(self.count, self.size)
        _refuse_doubles(self.ids)
        self._order = np.argsort(units, kind="stable")
        self._ends = np.cumsum(np.bincount(units))

    def rows(self, user: int) -> np.ndarray:
        """Returns the rows of one user.

        Args:
            user: Number of the user, 0 to count - 1.

        Returns:
            Row numbers, ascending, int64; at least one.
        """
        start = self._ends[user - 1] if user else 0
        return self._order[start : self._ends[user]]

    def counts(self) -> np.ndarray:
        """Returns the number of rows of each user. Private: it is not covered by any ε.

        Returns:
            int64, one for each user.
        """
        return np.diff(self._ends, prepend=0)

    def bounded(self, group_size: int, seed: bytes) -> np.ndarray:
        """Returns at most ``group_size`` rows of each user, the same ones for the same seed.

        Guarantee: which of a user's rows are kept depends on that user's id, on how many rows the
        user has, and on the seed; nobody else's data change it. So the seed may be public, and
        stored beside the weights: adding or removing a user changes that user's rows alone.

        Args:
            group_size: Most rows of one user, >= 1.
            seed: 16 to 64 bytes, drawn independently of the data.

        Returns:
            Row numbers, ascending, int64.

        Raises:
            ConfigurationError: ``group_size`` is not >= 1, or an id has no stable name.
        """
        size = checked_group_size(group_size)
        kept = []
        for user, key in enumerate(self.ids):
            rows = self.rows(user)
            if len(rows) > size:
                rows = rows[_keyed(key, seed).choice(len(rows), size, replace=False)]
            kept.append(rows)
        return np.sort(np.concatenate(kept))


def user_index(dataset: Any, users: UserIds | None, beside: object = None) -> UserIndex:
    """Finds out to which user each row of a data set belongs.

    Args:
        dataset: A map-style data set; `torch.utils.data.Subset` is looked through.
        users: Name of a column or attribute of the data set or of a key of its examples; a
            function of an example; or the ids themselves, one for each row. None looks for an
            attribute ``users`` of the data set, then of ``beside``.
        beside: The data module, or None.

    Returns:
        The index.

    Raises:
        ConfigurationError: There are no ids, or as `UserIndex`.
    """
    size = len(dataset)
    if users is None:
        ids = _attribute(dataset, _ATTRIBUTE)
        ids = getattr(beside, _ATTRIBUTE, None) if ids is None else ids
        if ids is None:
            raise _nobody("no attribute `users` of the data set or of the data module")
        ids = ids() if callable(ids) else ids
    elif isinstance(users, str):
        ids = _column(dataset, users)
    elif callable(users):
        ids = (users(dataset[row]) for row in range(size))
    elif not isinstance(users, Iterable):
        raise _nobody(f"users = {users!r}")
    else:
        ids = users
    found = list(ids)
    if len(found) != size:
        raise _nobody(f"{len(found)} ids for {size} rows")
    return UserIndex(found)


def checked_group_size(group_size: object) -> int:
    """Returns the contribution bound, or refuses it.

    Args:
        group_size: What was given.

    Returns:
        A whole number >= 1.

    Raises:
        ConfigurationError: It is none.
    """
    return whole_number(
        "group_size",
        group_size,
        at_least=1,
        cost="users of whom nothing, or everything, would be used",
        remedy="pass the most examples of one user; `lightning-privacy plan --unit user` compares",
    )


def check_user_sampling(user_sampling: object) -> None:
    """Refuses a way to draw that is not offered.

    Args:
        user_sampling: What was given.

    Raises:
        ConfigurationError: It is neither "users" nor "examples".
    """
    one_of(
        "user_sampling",
        user_sampling,
        USER_SAMPLINGS,
        cost="a guarantee for users without a rule how they are drawn",
        remedy="use 'users', which needs less noise where the examples of a user differ",
    )


def user_settings_without_users() -> ConfigurationError:
    """The refusal of settings for users where the unit is an example.

    Returns:
        The error, to be raised.
    """
    return ConfigurationError(
        must="`users`, `user_sampling` and `group_size` go with unit='user'",
        found="one of them with unit='example'",
        cost="an ε for single examples where one for users was meant",
        remedy="add unit='user', or leave them out",
    )


def _column(dataset: Any, name: str) -> Iterable[Hashable]:
    ids = _attribute(dataset, name)
    if ids is not None:
        return list(ids)
    first = dataset[0]
    if isinstance(first, Mapping) and name in first:
        return (dataset[row][name] for row in range(len(dataset)))
    known = [
        *(getattr(dataset, "column_names", None) or (first if isinstance(first, Mapping) else ()))
    ]
    there = f"; there are {', '.join(map(repr, known[:16]))}" if known else ""
    raise _nobody(f"no column, attribute or key of an example named {name!r}{there}")


def _attribute(dataset: Any, name: str) -> Any:
    """A column of a Hugging Face data set, or an attribute; through subsets."""
    if name in (getattr(dataset, "column_names", None) or ()):
        return dataset[name]
    ids = getattr(dataset, name, None)
    if ids is not None:
        return ids() if callable(ids) else ids
    inner, chosen = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if inner is None or chosen is None:
        return None
    whole = _attribute(inner, name)
    return None if whole is None else _picked(list(whole), chosen)


def _picked(whole: list[Hashable], chosen: Iterable[int]) -> Iterator[Hashable]:
    return (whole[index] for index in chosen)


def _checked(row: int, key: Any) -> Hashable:
    # A tensor hashes by identity: each row would be a user of its own.
    if getattr(key, "shape", None) == () and hasattr(key, "item"):
        key = key.item()
    if isinstance(key, _SEVERAL) or getattr(key, "shape", ()) != ():
        raise ConfigurationError(
            must="every example belongs to one user",
            found=f"a {type(key).__name__} of users in row {row}",
            cost="an example that would be drawn and clipped with one user, and expose the others",
            remedy="attribute it to one of them, split it, or make one unit of people who share "
            "examples; examples with several owners need an analysis of their own (arXiv "
            "2503.03622)",
        )
    if key is None or (isinstance(key, str) and not key.strip()) or key != key:  # NaN
        raise ConfigurationError(
            must="every example belongs to a user",
            found=f"the id {key!r} in row {row}",
            cost="rows of nobody, for whom no ε holds, or one unit made of many people",
            remedy="drop these rows, or give each of them an id of its own",
        )
    try:
        hash(key)
    except TypeError:
        raise ConfigurationError(
            must="the id of a user is hashable",
            found=f"a {type(key).__name__} in row {row}",
            cost="rows that cannot be told to belong together",
            remedy="use strings, numbers or tuples of them",
        ) from None
    if _is_known_by_identity(key):
        raise ConfigurationError(
            must="equal ids are one user",
            found=f"a {type(key).__name__} in row {row}, or a part, which equals itself only",
            cost="a user with as many units as rows, of whom each has the whole ε",
            remedy="use strings, numbers or tuples of them, or give the class __eq__ and __hash__",
        )
    return key  # type: ignore[no-any-return]


def _is_known_by_identity(key: object) -> bool:
    if isinstance(key, tuple):
        return any(map(_is_known_by_identity, key))
    # A tensor hashes by its identity, whatever it holds; a NumPy scalar by its value.
    tensor = hasattr(key, "item") and not isinstance(key, np.generic)
    return tensor or type(key).__hash__ is object.__hash__


def _refuse_too_few(count: int, size: int) -> None:
    if count < 2:
        raise ConfigurationError(
            must="there are at least two users",
            found=f"{count} user(s) in {size} rows",
            cost="a model that is noise, or a statement about one person",
            remedy="check which column names the user, or use unit='example'",
        )


def _refuse_doubles(ids: Sequence[Hashable]) -> None:
    seen: dict[str, Hashable] = {}
    for key in ids:
        other = seen.setdefault(_plain(key), key)
        if other is not key and other != key:
            raise ConfigurationError(
                must="one user has one id",
                found=f"{other!r} and {key!r}",
                cost="a user who is split into two units has twice the ε",
                remedy="bring ids to one form first, for instance str(user).strip()",
            )


def _plain(key: Hashable) -> str:
    """An id without the differences that nobody sees: blanks, encodings, invisible marks."""
    text = key.decode(errors="replace") if isinstance(key, bytes) else str(key)
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return "".join(mark for mark in text if unicodedata.category(mark) != "Cf")


def _keyed(key: Hashable, seed: bytes) -> np.random.Generator:
    name = repr(key)
    if " at 0x" in name:
        raise ConfigurationError(
            must="the id of a user has a name that is the same in every run",
            found=f"{name}, which holds a memory address",
            cost="examples chosen anew after a resume, where they are to be fixed for the run",
            remedy="use strings, numbers or tuples as ids, or give the class a __repr__",
        )
    digest = hashlib.blake2b(name.encode(), key=seed, digest_size=16, person=b"lp-bound")
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))


def _nobody(found: str) -> ConfigurationError:
    return ConfigurationError(
        must="it is known to which user each example belongs",
        found=found,
        cost="a guarantee for users that nobody can check",
        remedy="pass DifferentialPrivacy(users=...): a column or attribute name, a function of an "
        "example, or one id for each row; or give the data set or data module an attribute `users`",
    )
