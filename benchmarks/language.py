"""What the benchmarks on real text share: rows of a text that is one long tensor of tokens, and a parent trained on them.

Training on a busy machine is cut off now and then: [`train`] keeps its state in a file, and goes on from it with the same rows.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset

CLIP_NORM, WARMUP_STEPS, LAST_FACTOR = 1.0, 50, 0.02
SAVE_SECONDS = 120


class Clock:
    """How long a script may still work; without a limit, for ever."""

    def __init__(self, minutes: float | None = None):
        self._start, self._seconds = time.monotonic(), math.inf if minutes is None else 60 * minutes

    def over(self, share: float = 1.0) -> bool:
        """Whether more than this share of the time has passed."""
        return time.monotonic() - self._start > share * self._seconds

    def check(self, share: float = 1.0) -> None:
        """Ends the script if it is."""
        if self.over(share):
            raise SystemExit("The time is over. What was done is kept: the same command goes on from there.")


def draw(data: torch.Tensor, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Random rows in `int64`, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = int(torch.randint(0, len(data) - length, (), generator=generator))
        yield data[start : start + length].long()


def stream(data: torch.Tensor, length: int, seed: int) -> IterableDataset:
    """The same for a trainer: every token but the first of a row is a target."""

    def rows() -> Iterator[dict[str, list[int]]]:
        for row in draw(data, length, seed):
            yield {"input_ids": row.tolist(), "labels": row.tolist()}

    return IterableDataset.from_generator(rows)


def train(
    model: Any,
    rows: Iterator[torch.Tensor],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 3e-3,
    constant: float = 0.5,
    bfloat16: bool = False,
    state: Path | None = None,
    clock: Clock | None = None,
) -> Any:
    """Trains a stock model on rows: AdamW without weight decay, warm-up, constant, linear to 2 %.

    Args:
        rows (`Iterator[torch.Tensor]`): Of [`draw`], from its beginning: a run that goes on skips what it has read.
        constant (`float`, *optional*, defaults to 0.5): Share of the steps after which the learning rate falls, in [0, 1). A run that was cut off before may go on with
            another number of steps.
        bfloat16 (`bool`, *optional*, defaults to `False`): Whether to multiply matrices in bfloat16; weights stay as they are.
        state (`Path`, *optional*): File that the run goes on from if it is there, and that is written every two minutes and when the time is over.
        clock ([`Clock`], *optional*): Ends the script when its time is over.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    first, losses = 0, []
    if state is not None and state.exists():
        kept = torch.load(state, map_location=device, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["steps"]
        next(islice(rows, first * batch_size - 1, None))
    saved = time.monotonic()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            fall = max(LAST_FACTOR, (1 - step / steps) / (1 - constant))
            group["lr"] = learning_rate * min(1.0, (step + 1) / WARMUP_STEPS, fall)
        batch = torch.stack([next(rows) for _ in range(batch_size)]).to(device)
        with torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext():
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if len(losses) == 50:
            print(
                f"    {step + 1} of {steps} steps, {float(torch.stack(losses).mean()):.3f} nats per token", flush=True
            )
            losses.clear()
        over = clock is not None and clock.over()
        if state is not None and step + 1 < steps and (over or time.monotonic() - saved > SAVE_SECONDS):
            unfinished = state.with_suffix(".new")
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": step + 1}, unfinished
            )
            unfinished.replace(state)
            saved = time.monotonic()
            if clock is not None:
                clock.check()
    if state is not None:
        state.unlink(missing_ok=True)
    return model.eval()
