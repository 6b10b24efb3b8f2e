"""Measures every pair of sizes of the embedded lab on held-out problems and writes `data/measurements.json`.

Accuracy, tokens and cost do not depend on the machine's speed; `seconds` stays empty, as it says nothing on a machine that does other things, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

from phase_space.engine import ElasticEngine

from hf_elastic import PhasePlan
from hf_elastic.lab.book import THINK_END, THINK_START, Problem, problems
from hf_elastic.lab.task import EOS

ROOT = Path(__file__).parent


def measure(engine: ElasticEngine, todo: list[Problem], thinking: str, answering: str) -> dict[str, Any]:
    """One point of the chart: greedy, without caps that would cut a right solution."""
    model, tokenizer = engine.model, engine.tokenizer
    plan = PhasePlan(thinking, answering, max_thinking_tokens=128, max_answer_tokens=64)
    inputs = tokenizer([problem.prompt + THINK_START for problem in todo], padding=True, return_tensors="pt")
    output = model.generate(
        **inputs, phase_plan=plan, tokenizer=tokenizer, do_sample=False, return_dict_in_generate=True
    )
    texts = tokenizer.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :])
    answers = [text.partition(EOS)[0].partition(THINK_END)[2] for text in texts]
    active = {size.name: size.active_params for size in engine.sizes}
    tokens = sum(sum(record.generated) for record in output.phases)
    cost = sum(active[record.budget] * sum(record.generated) for record in output.phases)
    return {
        "plan": plan.to_dict(),
        "thinking": thinking,
        "answering": answering,
        "max_thinking_tokens": None,
        "accuracy": sum(a == p.answer for a, p in zip(answers, todo, strict=True)) / len(todo),
        "n": len(todo),
        "tokens": tokens / len(todo),
        "cost": cost / len(todo),
        "seconds": None,
        "device": engine.device,
        "dtype": engine.dtype,
        "commit": _commit(),
        "model": engine.name,
        "task": "held-out problems of 12 letters, whole answer right",
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=100, help="problems per plan (default: 100)")
    parser.add_argument("--output", type=Path, default=ROOT / "data" / "measurements.json")
    options = parser.parse_args()
    engine = ElasticEngine.lab()
    todo = list(itertools.islice(problems("heldout", 12, 0), options.problems))
    names = [size.name for size in engine.sizes]
    points = [measure(engine, todo, *pair) for pair in itertools.product(names, repeat=2)]
    options.output.write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
