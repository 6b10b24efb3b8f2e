"""Who should think and who should answer: phase plans of two sizes against budget control with one size.

Budget control with one size is what everybody has: a size, and a cap on its thinking tokens. A plan of two lets one size think and
another answer (arXiv 2605.07182). Here every size of the lab's trained family thinks, every size answers, under four caps.

- Accuracy is measured: whole answers (`exact`) and symbols of answers (`code`) of held-out `book` problems of 12 lines, by generation, with
  re-reading at the hand-over, as the papers count it. Mean of three seeds. The same is done for families that were trained to hand over their
  caches, which are then handed over (`by cache`).
- Time is measured where size decides and not Python: seconds per written token and per text that is read, of every size of a random
  family whose sizes have the lab's shares of active parameters, in bfloat16, one sequence at a time. The time of a plan is modelled from
  these and the tokens the lab's plan read and wrote: reading the prompt, thinking, reading prompt and thinking again if another size
  answers, answering. Whole plans are also run on the random family, and the ratio of modelled to measured time is reported.

The front of plans of one size and that of all plans are then compared in the papers' terms: the accuracy gained at no more time, and the
time saved at no less accuracy, each where it is largest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from harness import Claim, Report, in_turns, seconds
from lab_runs import LETTERS, SEEDS, SIZES, Runs, lab_arguments, mean
from processes import in_child
from synthetic import nano_like
from transformers import AutoModelForCausalLM

from hf_elastic import ElasticConfig, ElasticForCausalLM, Phase, PhasePlan
from hf_elastic.evaluation.plans import measure_plan, pareto_front, plan_matrix
from hf_elastic.lab.book import THINK_END
from hf_elastic.lab.book_task import BookTask

FAMILY = ("full", *SIZES)
HANDOVER = {"handover_probability": 0.5, "handover_token": THINK_END}
CAPS = (18, 36, 54, None)
"""A quarter, a half, three quarters and all of the 69 thinking tokens of a problem, `</think>` included."""
GAINED = "whole answers right: gained by plans of two sizes at no more time"
SAVED = "time of one size / time of a plan of two that is right as often"
MODEL = "time of whole plans, modelled / measured"
CLAIMS = [Claim(GAINED, 0.02, ">="), Claim(SAVED, 1.1, ">="), Claim(MODEL, 1.25)]
SHARES = {"half": (5 / 7, 0.5), "third": (4 / 7, 0.3), "quarter": (3 / 7, 0.25)}
"""Of hidden and of FFN widths, which give the random family about the lab family's shares of active parameters."""


def run(options: argparse.Namespace) -> int:
    runs = Runs(options)
    report = Report("phases", CLAIMS)
    seeds = [0] if options.quick else options.seeds or list(SEEDS)
    done = [runs.run(f"phases-{seed}", lambda seed=seed: matrix(runs, seed, options.quick)) for seed in seeds]
    cached = [runs.run(f"phases-cache-{seed}", lambda s=seed: matrix(runs, s, options.quick, True)) for seed in seeds]
    if options.seeds and not options.quick:
        return 0
    speed = in_child(measure_speed, options.quick).result
    for size, numbers in speed["sizes"].items():
        about = {"active_params": numbers["active"]}
        report.measure(f"random family, {size}: time per written token", "s", numbers["decode"], **about)
        for length, times in numbers["read"].items():
            report.measure(f"random family, {size}: time to read {length} tokens", "s", times, **about)
    worst = [max(ratio, 1 / ratio) for ratio in speed["modelled"].values()]
    report.measure("random family: modelled / measured time of whole plans", "", list(speed["modelled"].values()))
    report.settle(MODEL, max(worst))
    for way, matrices in (("", done), ("by cache: ", cached)):
        points = averaged(matrices, speed["sizes"])
        for point in points:
            name = f"{way}{point['thinking']} thinks, {point['answering']} answers, cap {point['max_thinking_tokens']}"
            for rate in ("exact", "code"):
                report.measure(f"{name}: {rate}", "share", point["runs"][rate], mean=point[rate])
            about = {key: value for key, value in point.items() if key not in ("runs", "seconds")}
            report.measure(f"{name}: modelled time", "s", [point["seconds"]], **about)
        gained, saved = [compare(report, points, rate, way) for rate in ("code", "exact")][-1]
        if not way:
            report.settle(GAINED, gained)
            report.settle(SAVED, saved)
    runs.say_commits(report)
    return report.finish(options)


def matrix(runs: Runs, seed: int, quick: bool, by_cache: bool = False) -> list[dict[str, Any]]:
    """Every plan on the trained family of a seed, or on that which was trained to hand over its caches."""
    if by_cache:
        family = runs.trained_family(f"trained-handover-{seed}", seed, **HANDOVER)
    else:
        family = runs.trained_family(f"trained-{seed}", seed)
    caps = CAPS[-1:] if quick else CAPS
    sizes = FAMILY[:2] if quick else FAMILY
    task = BookTask(letters=LETTERS, count=4 if quick else 100, batch_size=100)
    plans = plan_matrix(sizes, sizes, caps, handover="cache" if by_cache else "reprefill")
    return [measure_plan(family, runs.tokenizer, task, plan) for plan in plans]


def averaged(done: Sequence[Sequence[Mapping[str, Any]]], sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One point per plan: rates averaged over seeds, and the modelled time of its mean tokens."""
    points = []
    for same in zip(*done, strict=True):
        point = {key: same[0][key] for key in ("thinking", "answering", "max_thinking_tokens", "handover")}
        rates = {rate: [p["metrics"][rate] for p in same] for rate in ("exact", "code", "trace")}
        tokens = {key: mean([p[key] for p in same]) for key in ("prompt_tokens", "thinking_tokens", "answer_tokens")}
        point |= {"runs": rates, **{rate: mean(values) for rate, values in rates.items()}, **tokens}
        points.append(point | {"seconds": modelled(point, sizes)})
    return points


def modelled(point: Mapping[str, Any], sizes: Mapping[str, Any]) -> float:
    """Seconds of a plan from the rates of its sizes."""
    prompt, thinking, answer = (point[key] for key in ("prompt_tokens", "thinking_tokens", "answer_tokens"))
    first, last = sizes[point["thinking"]], sizes[point["answering"]]
    again = 0.0 if point["handover"] == "cache" or first is last else read_time(last, prompt + thinking)
    decode = [statistics.median(numbers["decode"]) for numbers in (first, last)]
    return read_time(first, prompt) + thinking * decode[0] + again + answer * decode[1]


def read_time(numbers: Mapping[str, Any], length: float) -> float:
    """Seconds to read a text, on the line through the two lengths that were measured."""
    (short, fast), (long, slow) = ((n, statistics.median(times)) for n, times in numbers["read"].items())
    return fast + (length - short) * (slow - fast) / (long - short)


def compare(report: Report, points: list[dict[str, Any]], rate: str, way: str) -> tuple[float, float]:
    """The most accuracy gained at no more time, and the most time saved at no less accuracy, over plans of one size."""
    rated = [{**point, "accuracy": point[rate]} for point in points]
    single = [p for p in rated if p["thinking"] == p["answering"]]
    mixed = [p for p in rated if p["thinking"] != p["answering"]]
    best = [single[i] for i in pareto_front(single, "seconds")]
    gains, savings = [(0.0, "", "")], [(1.0, "", "")]
    for plan in mixed:
        name = f"{plan['thinking']} -> {plan['answering']}, cap {plan['max_thinking_tokens']}"
        for one in best:
            against = f"{one['thinking']}, cap {one['max_thinking_tokens']}"
            if plan["accuracy"] >= one["accuracy"]:
                savings.append((one["seconds"] / plan["seconds"], name, against))
        affordable = [one for one in best if one["seconds"] <= plan["seconds"]]
        if affordable:
            one = affordable[-1]
            gain = plan["accuracy"] - one["accuracy"]
            gains.append((gain, name, f"{one['thinking']}, cap {one['max_thinking_tokens']}"))
    gained, saved = max(gains), max(savings)
    report.measure(f"{way}{rate}: gained at no more time", "share", [gained[0]], plan=gained[1], one_size=gained[2])
    report.measure(
        f"{way}{rate}: time of one size / of a plan as accurate", "", [saved[0]], plan=saved[1], one_size=saved[2]
    )
    front = [rated[i] for i in pareto_front(rated, "seconds")]
    two = sum(p["thinking"] != p["answering"] for p in front)
    report.measure(f"{way}{rate}: plans of two sizes among the best", "plans", [two], of=len(front))
    return gained[0], saved[0]


# -- speed -------------------------------------------------------------------------------------------------------------


def measure_speed(quick: bool) -> dict[str, Any]:
    """Child process: rates of every size of a random family, and whole plans on it."""
    torch.set_num_threads(2)
    family = random_family(quick)
    lengths, tokens, rounds = ((16, 48), 4, 1) if quick else ((37, 128), 24, 3)
    costs = family.elastic_config.costs()
    found: dict[str, Any] = {
        size: {"active": costs[size].active_params, "decode": [], "read": {n: [] for n in lengths}} for size in FAMILY
    }
    ids = torch.randint(8, 1000, (1, max(lengths)), generator=torch.Generator().manual_seed(0))

    def rates(size: str) -> None:
        for length in lengths:
            plan = PhasePlan(phases=[Phase(size, max_new_tokens=tokens)])
            out = generate(family, ids[:, :length], plan)
            found[size]["read"][length].append(out[0].prefill_seconds)
            found[size]["decode"].append(
                out[0].decode_seconds / (tokens - 1)
            )  # the first token is chosen after reading

    in_turns({size: lambda size=size: rates(size) for size in FAMILY}, rounds + 1)
    for numbers in found.values():  # the first round warms up
        numbers["decode"] = numbers["decode"][len(lengths) :]
        numbers["read"] = {n: times[1:] for n, times in numbers["read"].items()}
    ratios = {}
    thinking, answer = (6, 4) if quick else (68, 24)
    pairs = [("quarter", "full"), ("third", "half"), ("full", "third"), ("half", "half")]
    for thinker, answerer in pairs[: 1 if quick else None]:
        plan = PhasePlan(
            phases=[
                Phase(thinker, name="thinking", max_new_tokens=thinking),
                Phase(
                    answerer,
                    name="answering",
                    max_new_tokens=answer,
                    handover="reprefill" if thinker != answerer else "cache",
                ),
            ]
        )
        measured = statistics.median(
            [seconds(lambda plan=plan: generate(family, ids[:, :37], plan)) for _ in range(rounds)]
        )
        point = {"thinking": thinker, "answering": answerer, "handover": plan.phases[1].handover}
        point |= {"prompt_tokens": 37, "thinking_tokens": thinking, "answer_tokens": answer}
        ratios[f"{thinker} -> {answerer}"] = modelled(point, found) / measured
    return {"sizes": found, "modelled": ratios}


def generate(family: ElasticForCausalLM, ids: torch.Tensor, plan: PhasePlan) -> Any:
    kwargs = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return family.generate(ids, phase_plan=plan, return_dict_in_generate=True, **kwargs).phases


def random_family(quick: bool) -> ElasticForCausalLM:
    """Nemotron Nano v3's widths and first layers, fewer experts, and sizes with the lab's shares of active parameters."""
    if quick:
        parent = nano_like(torch.bfloat16, scale=8, experts=16, layers="MEM*E", vocab_size=1024)
    else:
        parent = nano_like(torch.bfloat16, scale=1, experts=16, layers="MEM*E", vocab_size=16384)
    budgets = {}
    for size, (hidden, ffn) in SHARES.items():
        budgets[size] = {
            "hidden": int(parent.hidden_size * hidden) // 8 * 8,
            "expert_ffn": int(parent.moe_intermediate_size * ffn) // 8 * 8,
            "shared_expert_ffn": int(parent.moe_shared_expert_intermediate_size * ffn) // 8 * 8,
        }
    return AutoModelForCausalLM.from_config(ElasticConfig.from_parent(parent, budgets)).eval()


if __name__ == "__main__":
    parser = lab_arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", help="do only the runs of these seeds, and write no result")
    sys.exit(run(parser.parse_args()))
