"""Recurrent layers step by step: their products at every step, and the gradients of these.

    rnn   h_t = tanh or relu(p_t + h_(t-1) U^T)
    lstm  i, f, g, o of p_t + h_(t-1) U^T;  c_t = f c_(t-1) + i g;  h_t = o tanh(c_t)
    gru   q_t = h_(t-1) U^T + b;  r, z of p_t + q_t;  n = tanh(p_t + r q_t);  h_t = (1 - z) n + z h_(t-1)

with p_t = x_t W^T + b. Both directions run in parallel: shapes are [d, t, r, .] for directions, steps and rows. The
factors of the backward recursion are formed for all steps at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Back = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Gradients of every h_t, and additionally of the last h and c -> gradients of p_t and of h_(t-1) U^T (+ b)."""


class Steps(NamedTuple):
    hidden: Tensor  # h_t, [d, t, r, k]
    back: Back


def rnn(p: Tensor, u: Tensor, h: Tensor, relu: bool) -> Steps:
    """p: [d, t, r, k], written over."""
    for one in p.unbind(1):
        one.baddbmm_(h, u.mT)
        h = one.relu_() if relu else one.tanh_()
    slope = (p > 0).to(p.dtype) if relu else 1 - p * p

    def back(outer: Tensor, dh: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        grads = torch.empty_like(slope)
        for t in reversed(range(slope.shape[1])):
            torch.mul(dh + outer[:, t], slope[:, t], out=grads[:, t])
            dh = torch.bmm(grads[:, t], u)
        return grads, grads

    return Steps(p, back)


def lstm(p: Tensor, u: Tensor, h: Tensor, c: Tensor) -> Steps:
    """p: [d, t, r, 4 k], written over."""
    k = h.shape[-1]
    hidden, cells, g, turned = (torch.empty_like(p[..., :k]) for _ in range(4))
    start = c
    for t, gates in enumerate(p.unbind(1)):
        gates.baddbmm_(h, u.mT)
        torch.tanh(gates[..., 2 * k : 3 * k], out=g[:, t])
        i, f, _, o = gates.sigmoid_().chunk(4, -1)
        c = torch.mul(f, c, out=cells[:, t]).addcmul_(i, g[:, t])
        h = torch.mul(o, torch.tanh(c, out=turned[:, t]), out=hidden[:, t])
    i, f, _, o = p.unflatten(-1, (4, k)).unbind(-2)
    before = torch.cat([start.unsqueeze(1), cells[:, :-1]], 1)
    to_cell, by_output = o * (1 - turned * turned), turned * o * (1 - o)
    by_cell = torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)], -2)

    def back(outer: Tensor, dh: Tensor, dc: Tensor) -> tuple[Tensor, Tensor]:
        grads = torch.empty_like(p)
        gates = grads.unflatten(-1, (4, k))
        for t in reversed(range(p.shape[1])):
            dh = dh + outer[:, t]
            dc = torch.addcmul(dc, dh, to_cell[:, t])
            torch.mul(dc.unsqueeze(-2), by_cell[:, t], out=gates[:, t, :, :3])
            torch.mul(dh, by_output[:, t], out=gates[:, t, :, 3])
            dc, dh = dc * f[:, t], torch.bmm(grads[:, t], u)
        return grads, grads

    return Steps(hidden, back)


def gru(p: Tensor, u: Tensor, b: Tensor, h: Tensor) -> Steps:
    """p: [d, t, r, 3 k], written over; b: [d, 1, 3 k]."""
    k, start = h.shape[-1], h
    hidden, q, n = (torch.empty_like(p[..., :k]) for _ in range(3))
    for t, one in enumerate(p.unbind(1)):
        recurrent = torch.baddbmm(b, h, u.mT)
        q[:, t] = recurrent[..., 2 * k :]
        r, z = one[..., : 2 * k].add_(recurrent[..., : 2 * k]).sigmoid_().chunk(2, -1)
        torch.addcmul(one[..., 2 * k :], r, q[:, t], out=n[:, t]).tanh_()
        h = torch.lerp(n[:, t], h, z, out=hidden[:, t])
    r, z, _ = p.unflatten(-1, (3, k)).unbind(-2)
    before, by_n = torch.cat([start.unsqueeze(1), hidden[:, :-1]], 1), (1 - z) * (1 - n * n)
    by_r, by_z = by_n * q * r * (1 - r), (before - n) * z * (1 - z)
    given, recurring = torch.stack([by_r, by_z, by_n], -2), torch.stack([by_r, by_z, by_n * r], -2)

    def back(outer: Tensor, dh: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        whole, grads = torch.empty_like(hidden), torch.empty_like(p)
        gates = grads.unflatten(-1, (3, k))
        for t in reversed(range(p.shape[1])):
            torch.add(dh, outer[:, t], out=whole[:, t])
            torch.mul(whole[:, t].unsqueeze(-2), recurring[:, t], out=gates[:, t])
            dh = torch.baddbmm(whole[:, t] * z[:, t], grads[:, t], u)
        return (whole.unsqueeze(-2) * given).flatten(-2), grads

    return Steps(hidden, back)
