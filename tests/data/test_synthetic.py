from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_privacy.data import SecretsCorpus, SyntheticSecrets
from lightning_privacy.errors import ConfigurationError


def test_the_corpus_is_a_function_of_its_settings_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = SecretsCorpus(n_users=50).users()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert SecretsCorpus(n_users=50).users() == first
    assert SecretsCorpus(n_users=50, seed=1).users() != first


def test_every_user_has_a_name_of_their_own():
    users = SecretsCorpus(n_users=3000).users()
    assert len({user.name for user in users}) == 3000


def test_names_as_people_have_them():
    pytest.importorskip("faker")
    users = SecretsCorpus(n_users=3000, backend="faker").users()
    assert len({user.name for user in users}) == 3000
    assert all(len(user.name.split()) >= 2 for user in users)
    assert users == SecretsCorpus(n_users=3000, backend="faker").users()
    assert {len(user.documents) for user in users} == {3}


def test_faker_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("lightning_privacy.data.synthetic.find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match="pip install Faker"):
        SecretsCorpus(backend="faker")


def test_the_secret_stands_in_the_first_document():
    corpus = SecretsCorpus(n_users=30, docs_per_user=4, fresh_docs=2)
    for user in corpus.users():
        assert len(user.documents) == 4
        assert len(user.fresh_documents) == 2
        assert user.documents[0] == user.secret_document(user.secret)
        assert user.secret in corpus.candidates()
        assert all(user.name in text for text in (*user.documents, *user.fresh_documents))
        assert all(user.secret not in text for text in user.documents[1:])


def test_candidates_are_the_whole_space():
    assert SecretsCorpus(digits=2).candidates() == [f"{n:02d}" for n in range(100)]


def test_secrets_are_uniform_and_bits_are_fair():
    users = SecretsCorpus(n_users=8000, digits=1).users()
    counts = np.bincount([int(user.secret) for user in users], minlength=10)
    chi_squared = ((counts - 800) ** 2 / 800).sum()
    assert chi_squared < 27.9  # 0.1 % of the chi-squared distribution with nine degrees
    members = sum(user.member for user in users)
    assert abs(members - 4000) < 3.3 * math.sqrt(2000)


def test_membership_does_not_depend_on_the_secret():
    users = SecretsCorpus(n_users=8000, digits=1).users()
    table = np.zeros((2, 10))
    for user in users:
        table[int(user.member), int(user.secret)] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 27.9


def test_members_train_and_the_others_validate():
    data = SyntheticSecrets(SecretsCorpus(n_users=40, docs_per_user=2))
    split = data.split()
    members = {user.name for user in data.synthetic_users if user.member}
    assert {document.user for document in split.train} == members
    assert {document.user for document in split.validation} == set(data.held_out_secrets)
    assert not members & set(data.held_out_secrets)
    assert len(split.train) == 2 * len(members)
    fresh = {text for user in data.synthetic_users for text in user.fresh_documents}
    texts = {document.text for document in (*split.train, *split.validation)}
    assert len(fresh - texts) > len(fresh) // 2


def test_the_knobs_of_memorisation():
    repeated = SecretsCorpus(n_users=4, repetitions=3).users()
    assert all(len(set(user.documents[:3])) == 1 for user in repeated)
    shared = SecretsCorpus(n_users=6, users_per_secret=3, digits=6).users()
    assert len({user.secret for user in shared}) == 2
    skewed = SecretsCorpus(n_users=20, docs_per_user=10, document_skew=1.0).users()
    lengths = [len(user.documents) for user in skewed]
    assert lengths[0] == 10
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_users", 1),
        ("n_users", 10**9),
        ("docs_per_user", 0),
        ("digits", 0),
        ("digits", 10),
        ("repetitions", 0),
        ("users_per_secret", 0),
        ("fresh_docs", -1),
        ("seed", -1),
        ("seed", True),
        ("backend", "invented"),
        ("n_users", 3.0),
        ("p_member", 0.0),
        ("p_member", 1.0),
        ("p_member", float("nan")),
        ("document_skew", -1.0),
        ("document_skew", float("inf")),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ConfigurationError, match=name):
        SecretsCorpus(**{name: value})
