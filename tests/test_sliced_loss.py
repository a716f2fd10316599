import pytest
import torch
from torch import nn
from torch.nn import functional as F

import grpo.sliced_loss
from grpo.heads import LmHead
from grpo.sliced_loss import sliced_loss

torch.set_num_threads(1)
B, T, V, C = 5, 3, 7, 4


def make(untied):
    torch.manual_seed(0)
    embedding = nn.Embedding(V, C).double()
    head = LmHead(embedding)
    if untied:
        head.untie(residual=6)
        nn.init.normal_(head.residual[-1].weight)
        head.double()
    return head, torch.randn(B, T, C, dtype=torch.float64, requires_grad=True), torch.randint(0, V, (B, T))


def sliced(head, hidden, loss):
    return sliced_loss(head, hidden, loss, vocabulary=V, parameters=[*head.parameters()] or [head.weight])


def value_and_gradients(head, hidden, targets, seen):
    def loss(rows, logits):
        seen.append(len(logits))
        return F.cross_entropy(logits.flatten(0, 1), targets[rows].flatten(), reduction="sum") / 10

    value = 3 * sliced(head, hidden, loss)  # what follows the sum reaches the gradients
    learned = [p for p in (hidden, *head.parameters(), head.weight) if p.requires_grad]
    return value, torch.autograd.grad(value, learned)


@pytest.mark.parametrize("untied", [False, True])
def test_slices_give_the_value_and_gradients_of_the_whole(untied, monkeypatch):
    head, hidden, targets = make(untied)
    whole, slices = [], []
    expected = value_and_gradients(head, hidden, targets, whole)
    monkeypatch.setitem(grpo.sliced_loss.LOGITS_AT_ONCE, "cpu", 2 * T * V)
    found = value_and_gradients(head, hidden, targets, slices)
    assert (whole, slices) == ([5], [2, 2, 1])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_frozen_states_get_no_gradient_and_the_head_does(monkeypatch):
    head, hidden, targets = make(True)
    monkeypatch.setitem(grpo.sliced_loss.LOGITS_AT_ONCE, "cpu", T * V)
    head.matrix.requires_grad_(False)
    value, gradients = value_and_gradients(head, hidden.detach(), targets, [])
    assert value.requires_grad and len(gradients) == 4
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_without_gradients_it_is_the_plain_sum(monkeypatch):
    head, hidden, _ = make(False)
    expected = head(hidden).square().sum()
    monkeypatch.setitem(grpo.sliced_loss.LOGITS_AT_ONCE, "cpu", T * V)
    with torch.no_grad():
        torch.testing.assert_close(sliced(head, hidden, lambda rows, logits: logits.square().sum()), expected)


def test_autocast_reaches_the_slices(monkeypatch):
    embedding = nn.Embedding(V, C)
    head, hidden = LmHead(embedding), torch.randn(B, T, C, requires_grad=True)
    monkeypatch.setitem(grpo.sliced_loss.LOGITS_AT_ONCE, "cpu", T * V)
    kinds = set()

    def loss(rows, logits):
        kinds.add(logits.dtype)
        return logits.float().square().sum()

    with torch.autocast("cpu", torch.bfloat16):
        value = sliced(head, hidden, loss)
    value.backward()
    assert kinds == {torch.bfloat16} and embedding.weight.grad.abs().sum() > 0 and hidden.grad.abs().sum() > 0
