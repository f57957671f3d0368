"""Gradients that are written out, against autograd's of the plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from plait.model import cross_entropy
from plait.model.transformer import rms_norm, rotary, rotate


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("shape", [(16,), (3, 16)])
def test_norm_and_rotation(shape):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))
    plain = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    assert torch.allclose(rms_norm(x, weight, 1e-3), plain)
    y = x.detach().float().requires_grad_()
    cos, sin = rotary(torch.arange(5)[None], torch.rand(8))
    turned, grad = rotate(y, cos, sin), torch.randn(2, 5, 3, 16)
    as_complex = torch.complex(*y.detach().chunk(2, -1)) * torch.complex(cos, sin)[..., 8:]
    assert torch.allclose(turned, torch.cat((as_complex.real, as_complex.imag), -1), atol=1e-6)
    # A rotation keeps products, so its gradient is the rotation back.
    back = torch.autograd.grad(turned, y, grad)[0]
    assert torch.allclose((back * y).sum(), (grad * turned).sum(), atol=1e-4)
    assert torch.allclose(rotate(back, cos, sin), grad, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [2**24, 300 * 130])
@pytest.mark.parametrize("many", [300, 1100])  # the least number of rows at which logits are known to be small
def test_the_loss_of_tokens(smoothing, chunk, many, monkeypatch):
    """In one chunk and in several, strips ending unevenly."""
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    monkeypatch.setattr(cross_entropy, "CLOSE", chunk)
    monkeypatch.setattr(cross_entropy, "TALL", 130)
    monkeypatch.setattr(cross_entropy, "STRIP", 300 * 7)
    torch.manual_seed(0)
    hidden, rows = (torch.randn(count, 24, requires_grad=True) for count in (400, many))
    targets = torch.randint(many, (400,))
    wanted = F.cross_entropy(hidden @ rows.t(), targets, reduction="sum", label_smoothing=smoothing)
    found = cross_entropy.total_loss(hidden, rows, targets, smoothing)
    assert torch.allclose(found, wanted, rtol=1e-5)
    for mine, theirs in zip(gradients(found / 7, hidden, rows), gradients(wanted / 7, hidden, rows), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(cross_entropy.total_loss(hidden, rows, targets, smoothing), wanted, rtol=1e-5)
