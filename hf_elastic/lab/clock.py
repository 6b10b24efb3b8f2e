"""What two sizes for one text save on this machine, measured: a plan and its answering size alone, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..generation import PhasePlan
from ..modeling_elastic import ElasticForCausalLM


def time_plans(
    family: ElasticForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    plans: Sequence[tuple[str, str]],
    *,
    rounds: int = 3,
    max_new_tokens: int = 200,
) -> list[float]:
    """Median seconds that each plan takes for a text, one text at a time.

    Plans take turns, so that whatever else the machine does meets all of them alike. The first turn, in which everything is made, does
    not count.

    Args:
        texts (`Sequence[str]`): What the model goes on from, such as a question with an open `<think>`.
        plans (`Sequence[tuple[str, str]]`): Per plan who thinks and who answers.
        rounds (`int`, *optional*, defaults to 3): How often every plan writes every text.
        max_new_tokens (`int`, *optional*, defaults to 200): Where a text ends at the latest.

    Returns:
        `list[float]`: In the order of `plans`.
    """
    inputs = [tokenizer(text, return_tensors="pt") for text in texts]
    taken: list[list[float]] = [[] for _ in plans]
    for turn in range(rounds + 1):
        for one in inputs if turn else inputs[:1]:
            for i, (thinking, answering) in enumerate(plans):
                started = time.perf_counter()
                _write(family, tokenizer, one, thinking, answering, max_new_tokens)
                if turn:
                    taken[i].append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]


@torch.no_grad()
def _write(
    family: ElasticForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    thinking: str,
    answering: str,
    max_new_tokens: int,
) -> None:
    if thinking == answering:
        with family.at(thinking):
            family.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    else:
        plan = PhasePlan(thinking, answering)
        family.generate(**inputs, phase_plan=plan, tokenizer=tokenizer, max_new_tokens=max_new_tokens, do_sample=False)
