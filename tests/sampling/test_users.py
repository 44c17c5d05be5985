"""Which rows are whose, what is refused, and a bound that nobody else's data can move."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.sampling import UserIndex, user_index

SEED = b"a seed that may be public" * 2
IDS = ["ann", "bo", "ann", "cy", "ann", "bo"]


class Rows(Dataset):
    """Examples that are dictionaries."""

    def __init__(self, ids):
        self.ids = list(ids)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"x": float(index), "who": self.ids[index]}


class WithUsers(Rows):
    @property
    def users(self):
        return tuple(self.ids)


def grouped(index: UserIndex) -> dict:
    return {key: index.rows(number).tolist() for number, key in enumerate(index.ids)}


EXPECTED = {"ann": [0, 2, 4], "bo": [1, 5], "cy": [3]}


# ---------------------------------------------------------------------- where ids come from
def columns():
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"x": list(range(6)), "who": IDS})


@pytest.mark.parametrize(
    ("dataset", "users", "beside"),
    [
        (Rows(IDS), "who", None),
        (Rows(IDS), "ids", None),
        (Rows(IDS), lambda example: example["who"], None),
        (Rows(IDS), IDS, None),
        (Rows(IDS), np.array(IDS), None),
        (WithUsers(IDS), None, None),
        (Rows(IDS), None, SimpleNamespace(users=IDS)),
        (Rows(IDS), None, SimpleNamespace(users=lambda: IDS)),
        (Subset(WithUsers(["x", *IDS, "y"]), range(1, 7)), None, None),
        (Subset(Subset(Rows(["x", *IDS, "y"]), range(7)), range(1, 7)), "ids", None),
        (Subset(Rows(["x", *IDS]), range(1, 7)), "who", None),
    ],
)
def test_ids_come_from_a_column_a_function_or_the_data_module(dataset, users, beside):
    assert grouped(user_index(dataset, users, beside)) == EXPECTED


def test_a_column_of_hugging_face_data():
    assert grouped(user_index(columns(), "who")) == EXPECTED
    assert grouped(user_index(Subset(columns(), [0, 1, 2, 3, 4, 5]), "who")) == EXPECTED


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 1],
        [(1, "a"), (1, "b"), (1, "a")],
        [b"x", b"y", b"x"],
        [True, 2.5, 1],
        [("a", np.int64(1)), "b", ("a", 1)],
    ],
)
def test_any_hashable_is_an_id(ids):
    assert [len(rows) for rows in grouped(UserIndex(ids)).values()] == [2, 1]


def test_scalar_tensors_are_compared_by_value():
    data = TensorDataset(torch.zeros(3, 1), torch.tensor([7, 8, 7]))
    index = user_index(data, lambda example: example[1])
    assert grouped(index) == {7: [0, 2], 8: [1]}
    assert grouped(UserIndex(np.array([7, 8, 7]))) == {7: [0, 2], 8: [1]}


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", None], "the id None in row 1"),
        (["a", ""], "the id '' in row 1"),
        (["a", "  "], "in row 1"),
        ([1.0, math.nan], "the id nan in row 1"),
        ([np.float64(1), np.float64("nan")], "the id nan in row 1"),
        (["a", ["b", "c"]], "a list of users in row 1"),
        (["a", {"b"}], "a set of users in row 1"),
        (["a", np.array([1, 2])], "a ndarray of users in row 1"),
        (["a", torch.tensor([1, 2])], "a Tensor of users in row 1"),
        (["a", bytearray(b"b")], "a bytearray in row 1"),
        (["a", "a"], r"1 user\(s\) in 2 rows"),
        ([], r"0 user\(s\) in 0 rows"),
        ([1, "1"], "1 and '1'"),
        (["ann", "bo", "ann "], "'ann' and 'ann '"),
        (["ann lee", "bo", "ann  lee"], "'ann lee' and 'ann  lee'"),
        (["ann", b"ann"], "'ann' and b'ann'"),
        (["\u00e9", "bo", "e\u0301"], "'\u00e9' and 'e"),
        (["ann", "ann\u200b"], "'ann' and 'ann"),
        ([object(), object()], "a object in row 0, or a part, which equals itself only"),
        ([("a", torch.tensor(1)), ("a", torch.tensor(1))], "equals itself only"),
    ],
)
def test_ids_that_would_not_protect_anybody_are_refused(ids, message):
    with pytest.raises(ConfigurationError, match=message):
        UserIndex(ids)


@pytest.mark.parametrize(
    ("dataset", "users", "message"),
    [
        (Rows(IDS), None, "no attribute `users`"),
        (Rows(IDS), "whom", "no column, attribute or key of an example named 'whom'"),
        (Rows(IDS), IDS[:-1], "5 ids for 6 rows"),
        (Rows(IDS), 7, "users = 7"),
        (TensorDataset(torch.zeros(3, 1)), "who", "no column"),
    ],
)
def test_unknown_users_are_refused(dataset, users, message):
    with pytest.raises(ConfigurationError, match=message):
        user_index(dataset, users)


def test_a_misspelt_column_is_told_the_columns_there_are():
    for dataset in (Rows(IDS), columns()):
        with pytest.raises(ConfigurationError, match="named 'whom'; there are 'x', 'who'"):
            user_index(dataset, "whom")


# ---------------------------------------------------------------------- the bound
def test_the_bound_keeps_at_most_so_many_of_each_user_and_always_the_same():
    ids = ["heavy"] * 50 + ["light"] * 2 + ["one"]
    kept = UserIndex(ids).bounded(4, SEED).tolist()
    assert kept == sorted(set(kept))
    assert [sum(ids[row] == user for row in kept) for user in ("heavy", "light", "one")] == [
        4,
        2,
        1,
    ]
    assert UserIndex(ids).bounded(4, SEED).tolist() == kept
    assert UserIndex(ids).bounded(4, SEED[::-1]).tolist() != kept


def test_which_of_a_users_rows_are_kept_does_not_depend_on_anybody_else():
    rows = [(user, number) for number in range(20) for user in ("ann", "bo", "cy")]

    def chosen(present):
        left = [row for row in rows if row[0] in present]
        kept = UserIndex([user for user, _ in left]).bounded(5, SEED)
        return {left[row] for row in kept.tolist()}

    everybody = chosen({"ann", "bo", "cy"})
    without = chosen({"bo", "cy"})
    assert without == {row for row in everybody if row[0] != "ann"}
    # Their positions in the data set did change, and so did the order of the users.
    assert len(everybody) == 15


def test_every_row_of_a_user_is_kept_as_often_as_any_other():
    kept = np.zeros(12)
    for number in range(600):
        seed = number.to_bytes(16, "big")
        kept[UserIndex(["a"] * 10 + ["b"] * 2).bounded(3, seed)] += 1
    assert kept[10:].tolist() == [600, 600]
    # 180 expected, standard deviation 11.
    assert np.abs(kept[:10] - 180).max() < 55


def test_an_id_without_a_stable_name_is_refused_where_the_bound_needs_it():
    class Person:
        def __init__(self, name):
            self.name = name

        def __eq__(self, other):
            return self.name == other.name

        def __hash__(self):
            return hash(self.name)

    ann, bo = Person("ann"), Person("bo")
    index = UserIndex([ann, ann, bo])
    with pytest.raises(ConfigurationError, match="holds a memory address"):
        index.bounded(1, SEED)
    assert index.bounded(2, SEED).tolist() == [0, 1, 2]


@pytest.mark.parametrize("bad", [0, 1.5, None, True])
def test_the_bound_is_a_whole_number(bad):
    with pytest.raises(ConfigurationError, match="`group_size` must be a whole number >= 1"):
        UserIndex(IDS).bounded(bad, SEED)


def test_a_hundred_thousand_users_are_indexed_in_seconds():
    generator = np.random.default_rng(0)
    counts = np.minimum((generator.pareto(1.1, 100_000) + 1).astype(int), 500)
    index = UserIndex(np.repeat(np.arange(100_000), counts).tolist())
    assert index.count == 100_000
    assert index.counts().tolist() == counts.tolist()
