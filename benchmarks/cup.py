"""The task `cup`, a third one to try recipes on: a knockout tournament whose players' strength is known by heart.

    ^1vs2kf3nj4ug><think>1vsv2kfk3njn4ugu5vkv6nuu7vuu</think>7R6R5W

Eight players meet in matches 1 to 4, their winners in 5 and 6, and the winners of these in 7. The thinking plays the matches, a line for
each: its number, both players, who wins. The answer names where the winners of the last three live.

It is the reverse of `book`: there thinking is easy and the answer takes a table of 100 entries; here the thinking takes a table, which of
two players wins for each of 325 pairs (drawn at random, so that no order of strength explains it), and the answer is looked up in the
thinking. A line depends on two lines far before it instead of the one before. Each character is one token.

The parent is a dense hybrid of short convolutions and attention (LFM2) of 67,264 parameters, and takes half a minute of one core.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from kept_runs import ROOT
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedTokenizerFast

from hf_elastic.lab.exercises import EOS, THINK_END, THINK_START, LabTask

PLAYERS = "abcdefghijklmnopqrstuvwxyz"
HOMES = PLAYERS.upper()
MATCHES = "1234567"
SIZES = {
    "half": {"hidden": 24, "ffn": 64},
    "third": {"hidden": 20, "ffn": 40},
    "quarter": {"hidden": 16, "ffn": 24},
}
"""Submodels that are trained; about 54, 33 and 20 % of the parent's parameters."""


def _known_by_heart(seed: int) -> tuple[dict[tuple[str, str], str], dict[str, str]]:
    rng = random.Random(seed)
    wins = {}
    for a, b in itertools.combinations(PLAYERS, 2):
        wins[a, b] = wins[b, a] = a if rng.random() < 0.5 else b
    return wins, dict(zip(PLAYERS, rng.choices(HOMES, k=len(PLAYERS)), strict=True))


WINS, HOME = _known_by_heart(seed=0)
"""Who wins a match of two players, and where a player lives."""


@dataclass(frozen=True)
class Problem:
    """A problem, as [`LabTask`] wants it."""

    prompt: str
    thinking: str
    answer: str


def make_problem(rng: random.Random) -> Problem:
    """Draws one problem; it belongs to either split."""
    pool = list(PLAYERS)
    players = [pool.pop(int(rng.random() * len(pool))) for _ in range(8)]
    pairs = [(players[i], players[i + 1]) for i in range(0, 8, 2)]
    prompt = "".join(match + a + b for match, (a, b) in zip(MATCHES, pairs, strict=False))
    won, lines = [], []
    for match in MATCHES:
        a, b = pairs[len(won)]
        won.append(WINS[a, b])
        lines.append(match + a + b + won[-1])
        if len(won) % 2 == 0:
            pairs.append((won[-2], won[-1]))
    answer = "".join(MATCHES[i] + HOME[won[i]] for i in (6, 5, 4))
    return Problem(f"^{prompt}>", "".join(lines), answer)


def problems(split: str, size: Any, seed: int) -> Iterator[Problem]:
    """Problems of a split without end; one in ten is held out, by a checksum of its prompt. There is only one size."""
    rng = random.Random(seed)
    while True:
        problem = make_problem(rng)
        if ("heldout" if zlib.crc32(problem.prompt.encode()) % 10 == 0 else "train") == split:
            yield problem


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, `<think>` and `</think>`."""
    symbols = ["<pad>", EOS, "^", THINK_START, THINK_END, ">", *MATCHES, *PLAYERS, *HOMES]
    backend = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(symbols)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in (THINK_START, THINK_END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token=EOS,
        bos_token="^",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_parent(seed: int, overrides: Mapping[str, Any] = MappingProxyType({})) -> Lfm2ForCausalLM:
    """An untrained parent."""
    tokenizer = build_tokenizer()
    layers = ["conv", "conv", "full_attention", "conv", "full_attention"]
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": len(layers),
        "layer_types": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "block_auto_adjust_ff_dim": False,
        "initializer_range": 0.08,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Lfm2ForCausalLM(Lfm2Config(**(fields | dict(overrides))))
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 40
    return model


def right(problem: Problem, answer: str) -> tuple[int, int]:
    """Homes that are right, of three."""
    return sum(a == b for a, b in zip(answer[1::2], problem.answer[1::2], strict=False)), 3


def explain(problem: Problem) -> str:
    """The task in words."""
    return (
        "Eight players meet in matches 1 to 4, the winners of 1 and 2 in match 5, those of 3 and 4 in match 6, and the winners of these in match 7. "
        "A line of the thinking is a match: its number, both players, who wins. The answer says where the winners of the last three live."
    )


TASK = LabTask(
    name="cup",
    unit="matches",
    trained=(7, 7),
    measured=7,
    shown=7,
    explain=explain,
    build_tokenizer=build_tokenizer,
    problems=problems,
    opening=lambda prompt: prompt + THINK_START,
    right=right,
    new_parent=new_parent,
    sizes=SIZES,
    parent_folder=Path(ROOT) / ".runs" / "cup-parent-0",
    family_folder=Path(ROOT) / ".runs" / "cup-family-0",
    parent_steps=500,
    family_steps=500,
)
