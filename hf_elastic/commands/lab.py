"""See the whole method on this machine, in a minute or two: no Hub, no GPU.

Takes a small hybrid that has learned to reason (it ships with the package; --from-scratch trains it again, about 4 minutes), makes it
elastic, cuts it to several sizes, solves held-out problems with each, switches sizes live, exports one, loads the export in a process
without this package, and prints a table. OUTPUT gets the elastic checkpoint, the export, results.json and a chart.

With --train it then learns four sizes in one run, by distillation from the parent (a few minutes), and compares them with the same sizes
cut without training. With --learn-sizes a second run learns the sizes, too: a router decides them under targets of active parameters.

  hf-elastic lab
  hf-elastic lab --train
  hf-elastic lab --train --learn-sizes
  hf-elastic lab --from-scratch --seed 1 --output run1
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from .common import add_json, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default="hf-elastic-lab", help="folder for everything that is made (default: hf-elastic-lab)"
    )
    parser.add_argument(
        "--from-scratch", action="store_true", help="train the parent first, instead of taking the one in the package"
    )
    parser.add_argument("--train", action="store_true", help="learn a family of sizes as well; needs trl")
    parser.add_argument(
        "--learn-sizes", action="store_true", help="with --train: a second run, in which a router decides the sizes"
    )
    parser.add_argument("--steps", type=int, default=1000, help="training steps of a run (default: 1000)")
    parser.add_argument("--problems", type=int, default=100, help="held-out problems per size (default: 100)")
    parser.add_argument("--letters", type=int, default=12, help="lines per problem, 4 to 12 (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and of the problems (default: 0)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the lab draws a chart with matplotlib: pip install 'hf-elastic[lab]'")
    if args.train and importlib.util.find_spec("trl") is None:
        raise ImportError("--train needs trl: pip install 'hf-elastic[train]'")
    if args.learn_sizes and not args.train:
        raise ValueError("--learn-sizes needs --train.")
    if args.steps < 4:
        raise ValueError(f"--steps={args.steps} must be at least 4.")
    if args.problems < 1 or not 4 <= args.letters <= 12:
        raise ValueError(f"--problems={args.problems} must be at least 1 and --letters={args.letters} in 4..12.")
    if Path(args.output).is_file():
        raise ValueError(f"--output={args.output} is a file; give a folder.")
    import torch
    from transformers.utils import logging

    from ..lab.chart import accuracy_chart
    from ..lab.zero_shot import run_zero_shot

    torch.set_num_threads(1)  # the model is so small that a second thread waits more than it works
    logging.set_verbosity_error()  # the notes about optional CUDA kernels would bury the results
    logging.disable_progress_bar()
    quiet = args.json
    say = (lambda text: None) if quiet else print
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    parent, tokenizer = _parent(args.from_scratch, args.seed, progress=not quiet)
    say(f"parent: {parent.num_parameters():,} parameters, pattern {parent.config.hybrid_override_pattern}")
    results = run_zero_shot(
        parent,
        tokenizer,
        output,
        count=args.problems,
        letters=args.letters,
        seed=args.seed,
        progress=not quiet,
        say=say,
    )
    accuracy_chart(results, output / "accuracy.png")
    say(render(results, output))
    if args.train:
        results["family"] = _train(parent, tokenizer, output, args, say)
    if args.learn_sizes:
        results["learned"] = _learn(parent, tokenizer, output, args, say)
    if quiet:
        print(json.dumps(results, indent=2))


def _train(parent: Any, tokenizer: Any, output: Path, args: argparse.Namespace, say: Any) -> dict[str, Any]:
    """Learn the family, and measure it before and after."""
    from ..lab.chart import family_chart
    from ..lab.family import BETWEEN, FAMILY, make_family, measure_family, train_family

    start = time.perf_counter()
    family = make_family(parent, tokenizer, seed=args.seed)
    measured = {"full": None, **{name: name for name in FAMILY}, "between": BETWEEN}
    options = {"count": args.problems, "letters": args.letters, "seed": args.seed}
    say(f"\ntraining {', '.join(['full', *FAMILY])} in one run of {args.steps} steps ...")
    untrained = measure_family(family, tokenizer, measured, **options)
    history = train_family(
        family, tokenizer, output / "trainer", steps=args.steps, seed=args.seed, progress=not args.json
    )
    trained = measure_family(family, tokenizer, measured, **options)
    family.save_pretrained(output / "family")
    tokenizer.save_pretrained(output / "family")
    results = {
        "task": {"letters": args.letters, "problems": args.problems, "seed": args.seed},
        "steps": args.steps,
        "untrained": untrained,
        "trained": trained,
        "history": _curves(history),
        "seconds": round(time.perf_counter() - start, 1),
    }
    (output / "family.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    family_chart(results, output / "family.png")
    say(render_family(results, output))
    return results


def _learn(parent: Any, tokenizer: Any, output: Path, args: argparse.Namespace, say: Any) -> dict[str, Any]:
    """Learn a family whose sizes a router decides, and measure it."""
    from ..lab.family import ROUTER_TARGETS, make_open_family, measure_family, router_steps, train_open_family
    from ..trainers.routing import REPORT_FILE

    start = time.perf_counter()
    family = make_open_family(parent, tokenizer, seed=args.seed)
    targets = ", ".join(f"{name} ({target})" for name, target in ROUTER_TARGETS.items())
    say(f"\nlearning the sizes {targets} in the first {router_steps(args.steps)} of {args.steps} steps ...")
    history = train_open_family(
        family, tokenizer, output / "trainer-learned", steps=args.steps, seed=args.seed, progress=not args.json
    )
    options = {"count": args.problems, "letters": args.letters, "seed": args.seed}
    trained = measure_family(family, tokenizer, {"full": None, **{name: name for name in ROUTER_TARGETS}}, **options)
    family.save_pretrained(output / "learned")
    tokenizer.save_pretrained(output / "learned")
    results = {
        "task": {"letters": args.letters, "problems": args.problems, "seed": args.seed},
        "steps": args.steps,
        "router_steps": router_steps(args.steps),
        "report": json.loads((output / "trainer-learned" / REPORT_FILE).read_text(encoding="utf-8")),
        "trained": trained,
        "history": _curves(history),
        "seconds": round(time.perf_counter() - start, 1),
    }
    (output / "learned.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    say(render_learned(results, output))
    return results


def _curves(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: entry[key] for key in entry if key == "step" or key.endswith("kl")} for entry in history]


def render_learned(results: dict[str, Any], output: Path) -> str:
    """The family of learned sizes as text."""
    whole = results["trained"][0]
    decided = {row["budget"]: row for row in results["report"]}
    rows = [["budget", "params", "active", "share", "target", "off by", "exact", "thinking", "codes", "sizes"]]
    for entry in results["trained"]:
        name, params, active, share, *rest = _row(entry, whole)
        row = decided.get(name)
        target = [f"{row['target_value']:,.0f} {row['quantity']}", f"{row['miss']:+.1%}"] if row else ["", ""]
        rows.append([name, params, active, share, *target, *rest])
    return "\n".join(
        [
            "",
            table(rows, right=frozenset(range(1, 9))),
            "",
            *(f"{name}: {row['why']}" for name, row in decided.items()),
            f"a router decided the sizes after {results['router_steps']} of {results['steps']} steps. Took {results['seconds']:.0f} s;",
            f"see {output / 'learned.json'}; the checkpoint, with its router, is {output / 'learned'}",
        ]
    )


def render_family(results: dict[str, Any], output: Path) -> str:
    """The trained family as text."""
    whole = results["trained"][0]
    rows = [["budget", "params", "active", "share", "untrained", "exact", "thinking", "codes", "sizes"]]
    for before, entry in zip(results["untrained"], results["trained"], strict=True):
        name, params, active, share, *rest = _row(entry, whole)
        rows.append([name, params, active, share, f"{before['exact']:.2f}", *rest])
    return "\n".join(
        [
            "",
            table(rows, right=frozenset(range(1, 8))),
            "",
            f"one run of {results['steps']} steps for all sizes; 'between' was never trained. Took {results['seconds']:.0f} s;",
            f"see {output / 'family.png'} and {output / 'family.json'}; the checkpoint is {output / 'family'}",
        ]
    )


def _parent(from_scratch: bool, seed: int, progress: bool) -> tuple[Any, Any]:
    from ..lab.book import build_tokenizer
    from ..lab.parent import load_parent, train_parent

    if not from_scratch:
        return load_parent()
    model, _ = train_parent(seed=seed, progress=progress)
    return model.eval(), build_tokenizer()


def _row(entry: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """Name, parameters, active ones, their share, three accuracies, and the sizes in which a budget differs from the whole parent."""
    changed = {axis: size for axis, size in entry["sizes"].items() if whole["sizes"].get(axis) != size}
    return [
        entry["name"],
        f"{entry['total_params']:,}",
        f"{entry['active_params']:,}",
        f"{entry['active_params'] / whole['active_params']:.0%}",
        *(f"{entry[key]:.2f}" for key in ("exact", "trace", "code")),
        " ".join(f"{axis}={size}" for axis, size in changed.items()) or "the whole parent",
    ]


def render(results: dict[str, Any], output: Path) -> str:
    """The results as text."""
    whole = results["budgets"][0]
    rows = [["budget", "params", "active", "share", "exact", "thinking", "codes", "sizes"]]
    rows += [_row(entry, whole) for entry in results["budgets"]]
    task, export = results["task"], results["export"]
    live = max(entry["live_difference"] for entry in results["budgets"])
    return "\n".join(
        [
            "",
            table(rows, right=frozenset(range(1, 7))),
            "",
            f"{task['problems']} held-out problems of {task['letters']} lines each, solved by generation; no submodel was trained.",
            f"sorted parent against parent: logits differ by {results['sorted_parent_difference']:.1e}",
            f"live submodels against slices from disk: same weights and answers, logits differ by {live:.1e}",
            f"export of {export['budget']} in plain transformers, without hf_elastic: logits differ by {export['difference']:.1e}",
            f"took {results['seconds']:.0f} s; see {output / 'accuracy.png'} and {output / 'results.json'}",
        ]
    )
