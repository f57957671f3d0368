"""Gradients that are written out, against autograd's of the plain formulas."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from plait.model import cross_entropy
from plait.model.layers import rms_norm, rotary, rotate
from plait.training.optimizer import make_optimizer


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


@pytest.mark.parametrize("largest", [0.5, 100.0])
def test_clipping_within_the_step_is_clipping_before_it(largest: float) -> None:
    """Three steps of ours beside torch's clipping and torch's AdamW, with a norm above and below the bound."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    peer = copy.deepcopy(ours)
    optimizer = make_optimizer([ours], 1e-2, 0.1, (0.9, 0.95))
    decays = [{"params": [p], "weight_decay": 0.1 if p.ndim >= 2 else 0.0} for p in peer.parameters()]
    peer_optimizer = torch.optim.AdamW(decays, lr=1e-2, betas=(0.9, 0.95))
    for _ in range(3):
        x = torch.randn(8, 24)
        for network in (ours, peer):
            network.zero_grad()
            network(x).square().sum().backward()
        optimizer.clip(torch.nn.utils.get_total_norm([p.grad for p in ours.parameters()]), largest)
        torch.nn.utils.clip_grad_norm_(peer.parameters(), largest)
        optimizer.step()
        peer_optimizer.step()
    for mine, theirs in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
