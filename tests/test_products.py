"""Linear layers by oneDNN: values and gradients of torch's own, and where they step aside."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from grpo import products
from grpo.products import Linear, linear

here = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN operator for linear layers"
)


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the products that oneDNN computes, on any machine that has it."""
    torch.manual_seed(0)
    shapes, multiply = [], products._multiply
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(
        products, "_multiply", lambda x, weight, bias=None: (shapes.append(x.shape), multiply(x, weight, bias))[1]
    )
    return shapes


@here
@pytest.mark.parametrize("outputs", [48, 256])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_float64(calls, outputs, bias):
    x, weight = torch.randn(8, 40, 96, requires_grad=True), torch.randn(outputs, 96, requires_grad=True)
    inputs = [x, weight] + ([torch.randn(outputs, requires_grad=True)] if bias else [])
    scale = torch.randn(8, 40, outputs)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    y, expected = linear(*inputs), F.linear(*exact)
    assert len(calls) == 1
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)
    gradients = torch.autograd.grad((y * scale).sum(), inputs)
    assert len(calls) == 3
    references = torch.autograd.grad((expected * scale.double()).sum(), exact)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=0, atol=5e-4)


@here
def test_strided_and_expanded_inputs_are_read_in_their_order(calls):
    weight = torch.randn(96, 256).t()  # [256, 96]
    for x in (torch.randn(96, 64).t(), torch.randn(64, 1, 96).expand(64, 3, 96), torch.randn(64, 200)[:, 7:103]):
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=0, atol=1e-4)
    assert len(calls) == 3


@here
def test_a_frozen_weight_gets_no_gradient_and_no_product_for_it(calls):
    layer = Linear(96, 256).requires_grad_(False)
    x = torch.randn(64, 96, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and len(calls) == 2
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(64, 96), rtol=0, atol=1e-5)


def test_other_dtypes_small_products_autocast_and_compiled_models_are_left_to_torch(calls):
    layer = Linear(96, 256)
    double = Linear(96, 256, dtype=torch.float64)
    assert torch.equal(double(torch.ones(64, 96).double()), F.linear(torch.ones(64, 96).double(), *double.parameters()))
    assert torch.equal(layer(torch.ones(2, 96)), F.linear(torch.ones(2, 96), *layer.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(64, 96)).dtype == torch.bfloat16
    compiled = torch.compile(layer, backend="eager")(torch.ones(64, 96))
    assert calls == []
    torch.testing.assert_close(compiled, layer(torch.ones(64, 96)))
    assert len(calls) == 1  # of the plain layer


def test_layers_start_and_are_stored_like_torchs_own():
    torch.manual_seed(0)
    ours = Linear(5, 7).state_dict()
    torch.manual_seed(0)
    theirs = nn.Linear(5, 7).state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@here
def test_many_numbers_of_rows_meet_few_kernels_and_the_same_values(calls):
    weight, bias = torch.randn(256, 96), torch.randn(256)
    for rows in range(512, 1025, 7):
        x = torch.randn(rows, 96)
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=0, atol=1e-4)
    assert len({shape[0] for shape in calls}) <= 9  # the two powers of 2 counted
    x, exact = torch.randn(7, 101, 96, requires_grad=True), weight.clone().requires_grad_()
    product = linear(x, exact)
    assert product.shape == (7, 101, 256)
    found = torch.autograd.grad(product.square().sum(), (x, exact))
    expected = torch.autograd.grad(F.linear(x, exact).square().sum(), (x, exact))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2)
