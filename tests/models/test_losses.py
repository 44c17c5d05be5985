from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_privacy.models import example_losses, frozen_head_losses, losses

B, T, D, V = 3, 7, 5, 11


@pytest.fixture(params=["one piece", "many pieces"])
def _pieces(request, monkeypatch):
    if request.param == "many pieces":
        monkeypatch.setattr(losses, "_PIECE", 2 * V + 1)  # two positions at a time


def drawn(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


def labels_of() -> torch.Tensor:
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    labels[0, :3] = -100  # a prompt
    labels[1, 4:] = -100  # padding
    labels[2] = -100  # nothing to learn
    return labels


def reference(logits, labels):
    """Row by row, by torch's own cross entropy."""
    rows = []
    for scores, row in zip(logits, labels, strict=True):
        chosen = row[1:] != -100
        if not chosen.any():
            rows.append(scores.sum() * 0)
            continue
        rows.append(F.cross_entropy(scores[:-1][chosen], row[1:][chosen]))
    return torch.stack(rows)


def gradient(loss, tensor, weights):
    return torch.autograd.grad((loss * weights).sum(), tensor)[0]


@pytest.mark.usefixtures("_pieces")
def test_losses_and_their_gradients_are_those_of_torch():
    logits, weights = drawn(B, T, V).requires_grad_(), torch.tensor([0.3, 2.0, 5.0])
    expected = reference(logits, labels_of())
    found = example_losses(logits, labels_of())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradient(found, logits, weights), gradient(expected, logits, weights), atol=1e-12, rtol=0
    )


@pytest.mark.usefixtures("_pieces")
def test_a_frozen_head_gives_the_same():
    hidden, weight = drawn(B, T, D).requires_grad_(), drawn(V, D)
    weights = torch.tensor([0.3, 2.0, 5.0])
    expected = reference(hidden @ weight.T, labels_of())
    found = frozen_head_losses(hidden, weight, labels_of())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradient(found, hidden, weights), gradient(expected, hidden, weights), atol=1e-12, rtol=0
    )
    with torch.no_grad():
        torch.testing.assert_close(frozen_head_losses(hidden, weight, labels_of()), found)


def test_bfloat16_is_summed_in_float32():
    hidden = drawn(B, T, D, dtype=torch.bfloat16).requires_grad_()
    weight = drawn(V, D, dtype=torch.bfloat16)
    found = frozen_head_losses(hidden, weight, labels_of())
    assert found.dtype == torch.float32
    expected = reference((hidden @ weight.T).float(), labels_of())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    own = gradient(found, hidden, torch.ones(B)).float()
    autograd = gradient(expected, hidden, torch.ones(B)).float()
    torch.testing.assert_close(own, autograd, rtol=2e-2, atol=2e-3)


def test_a_trainable_head_is_refused():
    with pytest.raises(ValueError, match="trainable"):
        frozen_head_losses(drawn(B, T, D), drawn(V, D).requires_grad_(), labels_of())


def test_what_is_not_finite_stays_in_its_row_and_out_of_ignored_positions():
    hidden, weight = drawn(B, T, D), drawn(V, D)
    hidden[1, 5:] = float("nan")  # behind the row's end
    hidden[0, 4] = float("inf")
    hidden.requires_grad_()
    found = frozen_head_losses(hidden, weight, labels_of())
    assert found.isfinite().tolist() == [False, True, True]
    grads = gradient(found, hidden, torch.ones(B))
    assert [row.isfinite().all().item() for row in grads] == [False, True, True]
    logits = (hidden @ weight.T).detach().requires_grad_()
    found = example_losses(logits, labels_of())
    assert found.isfinite().tolist() == [False, True, True]
    grads = gradient(found, logits, torch.ones(B))
    assert [row.isfinite().all().item() for row in grads] == [False, True, True]
