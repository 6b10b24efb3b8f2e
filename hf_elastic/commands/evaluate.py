"""Measure every size on your own rows (--data), or who should think and who should answer on a task (--task).

With --data nothing is generated: every size reads the same rows. `loss` says how well it predicts them, `kl` how far its predictions are
from those of the whole model (0 is the same), `agreement` how often both hold the same token likeliest. Before and after training, this
tells whether the sizes have learned.

With --task, for models that think: accuracy, tokens, time and modelled cost. Every thinker is tried with every answerer under every cap.
OUTPUT gets plans.json, with the plans that no other one beats, and plans.png. Tasks are those of lm-eval that generate text, and `stories`
and `book`, those of the lab's own models.

  hf-elastic evaluate family --data heldout.jsonl
  hf-elastic evaluate family --task gsm8k --thinking half --answering half --answering full --max-thinking-tokens 512 --output results
  hf-elastic evaluate hf-elastic-lab/elastic --task stories --max-thinking-tokens 34 --max-thinking-tokens none --output results
  hf-elastic evaluate family --task gsm8k --escalate-to full --confidence 0.8 --confidence 0.95       # and plans that are chosen per prompt
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..lab.tasks import TASKS as LAB_TASKS
from .common import (
    add_choice,
    add_device,
    add_json,
    add_markers,
    check_device,
    check_dtype,
    check_source,
    load_tokenizer,
    markers,
    table,
)
from .elastify import load_calibration

_DEFAULTS = {"split": "test", "handover": "auto", "by": "cost"}
"""Not in the parser, which then could not tell what was given."""
_OF_TASKS: tuple[str, ...] = (
    *("task", "include_path", "thinking", "answering", "max_thinking_tokens", "max_answer_tokens", "handover"),
    *("escalate_to", "confidence", "signal", "start", "end", "metric", "letters", "by", "prefill_speed", "output"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="REPO", help="Hub repository or folder of an elastic checkpoint")
    parser.add_argument(
        "--task", help="any generating task of lm-eval, or stories or book, those of the lab's models (default: book)"
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="instead of a task: rows to read, in a file (.jsonl, ...) or Hub dataset, with messages, text or input_ids. Gives loss, divergence "
        "(kl) from the whole model and agreement, per size",
    )
    parser.add_argument("--split", help="with --data: split of a Hub dataset (default: test)")
    parser.add_argument("--include-path", help="folder with further task files for lm-eval")
    parser.add_argument(
        "--thinking", action="append", metavar="BUDGET", help="who thinks; repeat it (default: every named size)"
    )
    parser.add_argument(
        "--answering", action="append", metavar="BUDGET", help="who answers; repeat it (default: every named size)"
    )
    parser.add_argument(
        "--max-thinking-tokens",
        action="append",
        metavar="CAP",
        help="cap on thinking tokens (0: no thinking), or none; repeat it (default: none)",
    )
    parser.add_argument("--max-answer-tokens", type=int, help="cap on the tokens of the answer")
    add_choice(parser, several=True)
    parser.add_argument(
        "--handover", choices=("auto", "cache", "reprefill"), help="how the answerer takes over (default: auto)"
    )
    add_markers(parser)
    parser.add_argument("--count", type=int, default=100, help="problems, or rows of --data (default: 100)")
    parser.add_argument(
        "--metric",
        help="which rate is the accuracy: code (parts of answers) or exact (whole answers) for tasks of the lab, or one of lm-eval's, such as exact_match,none",
    )
    parser.add_argument(
        "--size",
        "--letters",
        dest="letters",
        type=int,
        help="letters of a book problem (default: 12), or people of a story (5)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help="problems of the lab that are generated together, or rows that are read together (default: 50, or 4)",
    )
    parser.add_argument("--by", choices=("cost", "seconds"), help="what the front counts as the price (default: cost)")
    parser.add_argument(
        "--prefill-speed", type=float, help="tokens read in the time in which one is written, for the modelled cost"
    )
    parser.add_argument("--dtype", default="auto", help="type of the weights (default: the checkpoint's)")
    add_device(parser, "compute")
    parser.add_argument("--output", metavar="OUTPUT", help="folder for plans.json and plans.png")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from ..configuration.parent import refuse_adapter

    _refuse_stray(args)
    for name, value in (_DEFAULTS | {"batch_size": 50 if args.data is None else 4}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_source(args.repo)
    refuse_adapter(args.repo)
    if args.data is None:
        _measure_plans(args)
    else:
        _measure_texts(args)


def _refuse_stray(args: argparse.Namespace) -> None:
    """Refuse options that nothing would look at."""
    from ..errors import ElasticConfigError

    others: tuple[str, ...]
    if args.data is not None:
        why, others = "--data reads rows and prints what it finds", _OF_TASKS
    elif args.task in (None, *LAB_TASKS):
        why, others = f"the {args.task or 'book'} task makes its own problems", ("split", "include_path")
    else:
        why, others = f"--task {args.task} is one of lm-eval", ("split", "letters", "batch_size")
    if given := [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) is not None]:
        raise ElasticConfigError(f"{why}, so {', '.join(given)} would have no effect.")
    if args.split is not None and Path(args.data).is_file():
        raise ElasticConfigError(f"--data={args.data} is a file, which has no splits; leave out --split.")


def _measure_texts(args: argparse.Namespace) -> None:
    """Every size on rows of text: what `--data` asks for."""
    from ..elastification.calibration import batches_of
    from ..errors import ElasticConfigError
    from ..evaluation.texts import measure_texts
    from ..modeling_elastic import ElasticForCausalLM

    for name in ("count", "batch_size"):
        if getattr(args, name) < 1:
            raise ElasticConfigError(f"--{name.replace('_', '-')}={getattr(args, name)} must be at least 1.")
    device, dtype = check_device(args.device), check_dtype(args.dtype)
    data, tokenizer = load_calibration(args.data, args.split), load_tokenizer(args.repo)
    model: Any = ElasticForCausalLM.from_pretrained(args.repo, dtype=dtype).to(device)
    sizes = measure_texts(model, batches_of(data, args.batch_size, args.count, None, tokenizer))
    results = {"model": args.repo, "data": args.data, "sizes": sizes}
    if args.json:
        print(json.dumps(results, indent=1))
        return
    rows = [["size", "params", "loss", "perplexity", "kl", "agreement"]]
    for s in sizes:
        numbers = [f"{s['loss']:.4f}", f"{s['perplexity']:.4g}", f"{s['kl']:.4f}", f"{s['agreement']:.1%}"]
        rows.append([s["name"], f"{s['total_params']:,}", *numbers])
    print(table(rows, frozenset(range(1, 6))))
    print(
        f"\n{sizes[0]['tokens']:,} tokens. loss and kl are nats per token; kl and agreement compare with the whole model ({sizes[0]['name']})."
    )


def _measure_plans(args: argparse.Namespace) -> None:
    """Every thinker with every answerer under every cap on a task."""
    from tqdm.auto import tqdm

    from ..checkpoints.replacing import replacing
    from ..errors import ElasticConfigError, PhasePlanError
    from ..evaluation.lm_eval import LmEvalTask
    from ..evaluation.plans import PREFILL_SPEED, measure_plan, plan_matrix, results_file
    from ..lab.book_task import LabScore, check_reads_lab
    from ..modeling_elastic import ElasticForCausalLM

    caps = [_cap(text) for text in args.max_thinking_tokens or ["none"]]
    if (args.escalate_to is None) != (args.confidence is None) or (args.signal and args.escalate_to is None):
        raise PhasePlanError(
            "--escalate-to BUDGET and --confidence THRESHOLD need each other, and --signal needs both."
        )
    for name in ("count", "batch_size"):
        if getattr(args, name) < 1:
            raise ElasticConfigError(f"--{name.replace('_', '-')}={getattr(args, name)} must be at least 1.")
    if args.prefill_speed is not None and not 0 < args.prefill_speed < float("inf"):
        raise ElasticConfigError(f"--prefill-speed={args.prefill_speed} must be a positive number.")
    device = check_device(args.device)
    args.dtype = check_dtype(args.dtype)
    if args.output and Path(args.output).exists() and not Path(args.output).is_dir():
        raise ElasticConfigError(f"--output={args.output} is a file; give a folder.")
    task = _task(args)
    tokenizer = load_tokenizer(args.repo)
    if isinstance(task, LabScore):
        check_reads_lab(task.name, tokenizer, args.repo)
    model = ElasticForCausalLM.from_pretrained(args.repo, dtype=args.dtype).to(device)
    names = list(model.elastic_config.family())
    options: dict[str, Any] = {"max_answer_tokens": args.max_answer_tokens, "handover": args.handover}
    options |= {
        "escalate_to": args.escalate_to,
        "confidences": args.confidence or [],
        "signals": args.signal or ["answer_min"],
    }
    plans = plan_matrix(args.thinking or names, args.answering or names, caps, **options, **markers(args))
    if args.escalate_to is not None and all(plan.phases[-1].escalate_to is None for plan in plans):
        raise PhasePlanError(
            f"--escalate-to {args.escalate_to} is the only one of --answering, so nobody escalates to it; add a smaller size."
        )
    plans = [plan.with_markers(tokenizer) for plan in plans]
    if isinstance(task, LmEvalTask):
        task.think_end_token = plans[0].phases[0].end
    for budget in {budget for plan in plans for budget in plan.budgets}:
        model.elastic_config.resolve(budget, model.dtype)  # all of them, before the first one takes its time
    speed = args.prefill_speed or PREFILL_SPEED
    points = [
        measure_plan(model, tokenizer, task, plan, prefill_speed=speed)
        for plan in tqdm(plans, desc="plans", unit="plan", disable=args.json)
    ]
    results = results_file(args.repo, task.name, points, args.by)
    if args.output:
        with replacing(args.output) as folder:
            (folder / "plans.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        with replacing(args.output) as folder:  # whatever becomes of the chart, the numbers are there
            _draw(results, model, folder / "plans.png")
    print(json.dumps(results, indent=1) if args.json else _text(results))


def _cap(text: str) -> int | None:
    from ..errors import PhasePlanError

    if text == "none":
        return None
    if not text.isdecimal():
        raise PhasePlanError(f"--max-thinking-tokens={text!r} must be a whole number (0 is no thinking), or none.")
    return int(text)


def _task(args: argparse.Namespace) -> Any:
    from ..errors import ElasticConfigError
    from ..lab.book_task import BookTask, StoriesTask

    if args.task in (None, *LAB_TASKS):
        name, metric = args.task or "book", args.metric or "code"
        if metric not in ("code", "exact"):
            raise ElasticConfigError(f"--metric={metric!r} must be code or exact for the {name} task.")
        kind, unit = (BookTask, "letters") if name == "book" else (StoriesTask, "people")
        size = {} if args.letters is None else {unit: args.letters}
        return kind(count=args.count, batch_size=args.batch_size, metric=metric, **size)
    from ..evaluation.lm_eval import LmEvalTask, find_tasks

    find_tasks([args.task], args.include_path)  # before anything is loaded
    return LmEvalTask(args.task, limit=args.count, include_path=args.include_path, metric=args.metric)


def _draw(results: dict[str, Any], model: Any, path: Path) -> None:
    import sys

    from ..evaluation.pareto_chart import draw_pareto

    try:
        draw_pareto(results, path, largest=max(c.active_params for c in model.elastic_config.costs().values()))
    except ImportError:
        print("no plans.png: pip install matplotlib for the chart", file=sys.stderr)


def _text(results: dict[str, Any]) -> str:
    from ..generation.plan import who_answers

    rows = [["thinking", "answering", "cap", "accuracy", "tokens", "seconds", "cost", "best"]]
    for i, p in enumerate(results["points"]):
        tokens = f"{p['thinking_tokens']:.0f}+{p['answer_tokens']:.0f}"
        cap = "" if p["max_thinking_tokens"] is None else str(p["max_thinking_tokens"])
        best = "*" if i in results["front"] else ""
        numbers = [f"{p['accuracy']:.3f}", tokens, f"{p['seconds']:.3g}", f"{p['cost']:.3g}"]
        rows.append([p["thinking"], who_answers(p), cap, *numbers, best])
    return table(rows, frozenset({2, 3, 4, 5, 6}))
