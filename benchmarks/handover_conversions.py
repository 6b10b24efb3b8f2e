"""Ways to convert what one size keeps into what another one goes on with, without touching their weights; for `handover_training.py`.

A state is seen as rows of channels: of keys and values one row per token, of a convolution one per place of its kernel, of an SSM state one
per entry of its state dimension. A conversion multiplies the channels by factors, or the rows by a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from hf_elastic.generation.caches import PER_TOKEN, States

Convert = Callable[[States], States]


def rows_of(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A state as `(rows, channels)`."""
    kind = key.partition(".")[0]
    if kind in PER_TOKEN:  # (batch, heads, tokens, head_dim)
        return tensor.transpose(1, 2).flatten(2).flatten(0, 1)
    if kind == "conv":  # (batch, channels, kernel)
        return tensor.transpose(1, 2).flatten(0, 1)
    return tensor.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)  # (batch, heads, head_dim, state)


def of_rows(key: str, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of [`rows_of`]; `like` has the shape."""
    kind = key.partition(".")[0]
    batch = like.shape[0]
    if kind in PER_TOKEN:
        return rows.view(batch, like.shape[2], like.shape[1], like.shape[3]).transpose(1, 2)
    if kind == "conv":
        return rows.view(batch, like.shape[2], like.shape[1]).transpose(1, 2)
    return rows.view(batch, like.shape[3], like.shape[1], like.shape[2]).permute(0, 2, 3, 1)


def multiplied(states: States, factors: Any) -> States:
    """States times factors `(channels,)` or matrices `(channels, channels)`, by layer and key."""
    made: States = []
    for i, found in enumerate(states):
        layer = {}
        for key, tensor in found.items():
            by, rows = factors[i, key], rows_of(key, tensor)
            layer[key] = of_rows(key, rows @ by if by.dim() == 2 else rows * by, tensor).contiguous()
        made.append(layer)
    return made


@torch.no_grad()
def least_squares(drawn: Sequence[Any], source: str, target: str, kind: str) -> Convert:
    """Factors or matrices that bring what `source` keeps nearest to what `target` keeps of the same tokens.

    Args:
        drawn (`list[Readings]`): To fit them on.
        kind (`str`): `"head"`, `"channel"` or `"matrix"`. A convolution has no heads, and one factor.
    """
    given = [readings.converted(source, target, scale=False) for readings in drawn]
    factors = {}
    for i, found in enumerate(given[0]):
        for key, tensor in found.items():
            x = torch.cat([rows_of(key, states[i][key]) for states in given])
            y = torch.cat([rows_of(key, readings.states[target][i][key]) for readings in drawn])
            if kind == "matrix":
                ridge = 1e-4 * float(x.square().mean()) * len(x)
                factors[i, key] = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ y)
                continue
            heads = 1 if key.startswith("conv") else tensor.shape[1]
            groups = heads if kind == "head" else x.shape[1]
            x, y = x.unflatten(1, (groups, -1)), y.unflatten(1, (groups, -1))
            by = (x * y).sum((0, 2)) / x.square().sum((0, 2)).clamp(min=1e-12)
            factors[i, key] = by.repeat_interleave(x.shape[2])
    return lambda states: multiplied(states, factors)


def fitted(drawn: Sequence[Any], source: str, target: str, kind: str, steps: int) -> Convert:
    """Factors or matrices by Adam, from those of the formula, on the divergence of what `target` says after the hand-over from what it says
    after reading everything; a group of calibration rows a step."""
    given = [readings.converted(source, target, scale=False) for readings in drawn]
    with_formula = drawn[0].converted(source, target)
    factors = {}
    for i, found in enumerate(given[0]):
        for key, tensor in found.items():
            by = float(with_formula[i][key].norm() / tensor.norm().clamp(min=1e-12))
            channels = rows_of(key, tensor).shape[1]
            made = torch.full((channels,), by) if kind == "channel" else torch.eye(channels) * by
            factors[i, key] = made.requires_grad_()
    optimizer = torch.optim.Adam(factors.values(), lr=3e-2 if kind == "channel" else 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    model = drawn[0].model
    wanted = []
    for readings in drawn:
        with torch.no_grad(), model.at(target):
            wanted.append(readings.logits(target, readings.states[target]).log_softmax(-1)[:, :-1][readings.compared])
    for step in range(steps):
        i = step % len(drawn)
        with torch.enable_grad(), model.computing(target):
            said = drawn[i].logits(target, multiplied(given[i], factors)).log_softmax(-1)
            loss = F.kl_div(said[:, :-1][drawn[i].compared], wanted[i], log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    done = {place: by.detach() for place, by in factors.items()}
    return lambda states: multiplied(states, done)
