"""What `phases.py` measures of one plan on one task: answers problem by problem, and the time of one sequence at a time.

Time is what one thread of the process computes: alone on a machine that is wall time, and other programs do not make it longer.

A plan runs on the trained family that ships with the package. Where its sizes take the same time on a CPU, because models so small spend it in
Python, the time is that of a stand-in: a random family with the same shares of active parameters, wide enough for size to decide, that reads
and writes as many tokens as the plan did, phase by phase.
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Lfm2Config

from hf_elastic import ElasticConfig, ElasticForCausalLM, Phase, PhasePlan
from hf_elastic.evaluation.plans import Task, planned
from hf_elastic.generation.plan import SIGNALS
from hf_elastic.lab.tasks import get_task

VALIDATION = 1001
"""Seed of the problems of the training split that plans are chosen on; no training has it."""
STAND_IN = {"book"}
"""Tasks whose sizes differ in widths alone."""
BATCH = 100
Answer = dict[str, Any]


class Followed(Task):
    """A task that follows every plan as it is."""

    name = "lab"

    def score(self, model: Any, tokenizer: Any) -> Any:
        raise NotImplementedError


@dataclass
class Lab:
    """A task of the lab with its trained family.

    Args:
        name (`str`): Of the task.
        quick (`bool`): Whether few and short problems will do.
    """

    name: str
    quick: bool = False

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.task = get_task(self.name)

    @cached_property
    def model(self) -> ElasticForCausalLM:
        return ElasticForCausalLM.from_pretrained(self.task.family_folder, dtype=torch.float32).eval()

    @cached_property
    def tokenizer(self) -> Any:
        return self.task.build_tokenizer()

    @cached_property
    def key(self) -> str:
        """Names kept runs: the task, and which weights its family has."""
        files = sorted(self.task.family_folder.glob("*.safetensors"))
        return f"{self.name}-{zlib.crc32(b''.join(file.read_bytes() for file in files)):08x}"

    @property
    def sizes(self) -> list[str]:
        """From the largest to the smallest."""
        costs = self.model.elastic_config.costs()
        return sorted(costs, key=lambda name: -costs[name].active_params)

    def problems(self, split: str, seed: int, count: int) -> list[Any]:
        source = self.task.problems(split, 2 if self.quick else self.task.measured, seed)
        return [next(source) for _ in range(count)]

    @cached_property
    def thinking_tokens(self) -> int:
        """Most that a problem takes, `</think>` included."""
        texts = [problem.thinking for problem in self.problems("train", VALIDATION, 50)]
        return 1 + max(len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"])

    def solve(self, plan: PhasePlan, split: str, seed: int, count: int) -> list[Answer]:
        """What became of every problem under a plan: `right` (the whole answer), `parts` (share of it), tokens, and who answered."""
        answers = []
        todo = self.problems(split, seed, count)
        for start in range(0, count, BATCH):
            batch = todo[start : start + BATCH]
            with planned(self.model, plan, self.tokenizer, Followed()) as recorded:
                texts = self.task.complete(self.model, self.tokenizer, batch)
            (phases,), (prompts,) = recorded.phases, recorded.prompts
            for row, (problem, text) in enumerate(zip(batch, texts, strict=True)):
                right, trace, good, parts = self.task.score(problem, text)
                answers.append(
                    {
                        "right": right,
                        "trace": trace,
                        "parts": good / parts,
                        "prompt": prompts[row],
                        "thinking": phases[0].generated[row] + phases[0].inserted[row],
                        "answer": sum(phase.generated[row] for phase in phases[1:]),
                        "drafted": sum(phase.drafted[row] for phase in phases),
                        "escalated": len(phases) > 2 and phases[2].reasons[row] is not None,
                        "confidence": phases[1].confidence[row],
                        "handover": phases[1].handover,
                    }
                )
        return answers

    # -- time ----------------------------------------------------------------------------------------------------------

    def times(
        self, plans: Mapping[str, tuple[PhasePlan, Sequence[Sequence[Answer]]]], count: int, turn: int
    ) -> dict[str, float]:
        """Seconds per problem of every plan, one after the other; those of a plan that is chosen per prompt weigh both ways by how often they went.

        Args:
            plans: By a name, every plan with its answers to the held-out problems of every seed.
            count (`int`): How many problems are timed, of each way; those of seed 0 that are the first to go it.
            turn (`int`): Every second turn goes through the plans from the last to the first.
        """
        actions, shares = {}, {}
        for name, (plan, answers) in plans.items():
            for way in (False, True):
                places = [i for i, answer in enumerate(answers[0]) if answer["escalated"] is way][:count]
                if places:
                    todo = [self._one(plan, answers[0], i) for i in places]
                    actions[name, way] = lambda todo=todo: statistics.fmean(_seconds(one) for one in todo)
                    shares[name, way] = statistics.fmean(a["escalated"] is way for seed in answers for a in seed)
        next(iter(actions.values()))()  # what is loaded on first use
        runs = {which: actions[which]() for which in list(actions)[:: -1 if turn % 2 else 1]}
        found: dict[str, float] = {}
        for name in plans:
            ways = [(shares[name, way], runs[name, way]) for way in (False, True) if (name, way) in actions]
            whole = sum(share for share, _ in ways)  # less than 1 if a way was gone with another seed alone
            found[name] = sum(share * seconds for share, seconds in ways) / whole
        return found

    def _one(self, plan: PhasePlan, answers: Sequence[Answer], i: int) -> Callable[[], None]:
        """Answer one problem, or read and write as many tokens on the stand-in."""
        if self.name in STAND_IN:
            return lambda: replay(self._stand_in, plan, answers[i])
        problem = self.problems("heldout", 0, i + 1)[i]

        def solve() -> None:
            with planned(self.model, plan, self.tokenizer, Followed()):
                self.task.complete(self.model, self.tokenizer, [problem])

        return solve

    @cached_property
    def _stand_in(self) -> ElasticForCausalLM:
        return random_family(self.sizes, self.quick)


def _seconds(action: Callable[[], None]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


SHARES = {"half": (0.75, 0.68), "third": (0.6, 0.58), "quarter": (0.5, 0.46)}
"""Of hidden and of FFN widths, which give the stand-in about the shares of active parameters of the `book` family."""


def random_family(sizes: Sequence[str], quick: bool) -> ElasticForCausalLM:
    """A dense hybrid of short convolutions and attention with random weights, wide enough for size to decide on one thread."""
    width = 128 if quick else 640
    layers = (
        ["conv", "full_attention"] if quick else ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]
    )
    parent = Lfm2Config(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=4 * width,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=len(layers),
        layer_types=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    budgets = {
        size: {"hidden": int(width * SHARES[size][0]) // 8 * 8, "ffn": int(4 * width * SHARES[size][1]) // 8 * 8}
        for size in sizes[1:]
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ElasticConfig.from_parent(parent, budgets)).eval()


def replay(family: ElasticForCausalLM, plan: PhasePlan, answer: Answer) -> None:
    """Read and write on another family what an answer took under a plan; a draft that was thrown away stays in the text there."""
    thinking, last = plan.phases[0].budget, plan.phases[-1]
    parts = [(thinking, answer["thinking"])]
    if answer["drafted"]:
        parts.append((last.budget, answer["drafted"]))
    parts.append((last.escalate_to if answer["escalated"] else last.budget, answer["answer"]))
    phases = [Phase(budget, name=str(i), max_new_tokens=tokens) for i, (budget, tokens) in enumerate(parts) if tokens]
    ids = torch.randint(8, 1000, (1, answer["prompt"]), generator=torch.Generator().manual_seed(0))
    family.generate(ids, phase_plan=PhasePlan(phases=phases), do_sample=False, eos_token_id=None, pad_token_id=0)


def cascade(thinking: str, answering: str, larger: str, signal: str, confidence: float) -> PhasePlan:
    return PhasePlan(thinking, answering, escalate_to=larger, signal=signal, confidence=confidence)  # type: ignore[arg-type]


def auroc(values: Sequence[float], right: Sequence[bool]) -> float:
    """How well a confidence tells right answers from wrong ones: the chance that a right one has the higher value; 0.5 is a guess."""
    good = [value for value, is_right in zip(values, right, strict=True) if is_right]
    bad = [value for value, is_right in zip(values, right, strict=True) if not is_right]
    return statistics.fmean((g > b) + 0.5 * (g == b) for g in good for b in bad)


__all__ = ["SIGNALS", "VALIDATION", "Answer", "Lab", "auroc", "cascade"]
