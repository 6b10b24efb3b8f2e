"""See the whole method on this machine, in about a minute: no Hub, no GPU.

A small hybrid model that has learned word problems in plain English, and its family of three sizes in one checkpoint, ship with the
package. The lab explains the task, makes the model elastic, lets every size solve problems that were not in training, shows one problem as
the sizes solve it, lets a small size think for the large one against the clock, switches sizes while the model runs, exports one, and
loads the export in a process without this package. OUTPUT gets the family (elastic/), the plain model that it is made from (parent/), the
export (export/), results.json and a chart.

With --train it learns the family here instead of taking the one in the package; --from-scratch first trains the model that it is made from,
too: about 15 minutes on one CPU core for both.

--task book is a second task, in signs instead of words, for a hybrid of Mamba, attention and mixture-of-experts layers, in four sizes. Two
options are for it alone. With --learn-sizes a second run learns which sizes to have: a router decides them under targets of active
parameters. With --quantize, all sizes of a second family, whose cuts NVFP4 can hold, are stored in 8 and in 4 bits and measured again: in
FP8 by calibration alone, in NVFP4 (the default) also after distilling it while its weights are rounded, which takes about 3 minutes more.
OUTPUT/quantized gets a checkpoint per format, each with a card that compares them.

  hf-elastic lab
  hf-elastic lab --train
  hf-elastic lab --from-scratch --seed 1 --output run1
  hf-elastic lab --task book --quantize fp8
  hf-elastic lab --task book --train --learn-sizes
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from ..lab.tasks import TASKS
from .common import add_json, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default="hf-elastic-lab", help="folder for everything that is made (default: hf-elastic-lab)"
    )
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help=f"what the model solves (default: {TASKS[0]})")
    parser.add_argument(
        "--from-scratch", action="store_true", help="train the model itself first, then the family, as with --train"
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="learn the family here, instead of taking the one in the package; needs trl",
    )
    parser.add_argument(
        "--learn-sizes",
        action="store_true",
        help="book, with --train: a second run, in which a router decides the sizes",
    )
    parser.add_argument(
        "--quantize",
        nargs="?",
        const="nvfp4",
        choices=("nvfp4", "fp8"),
        metavar="FORMAT",
        help="book: also store a family in fp8, or in fp8 and in nvfp4, which is the default and needs trl",
    )
    parser.add_argument("--steps", type=int, help="training steps of a run (default: as many as the task needs)")
    parser.add_argument("--problems", type=int, default=100, help="held-out problems per size (default: 100)")
    parser.add_argument(
        "--size",
        "--letters",
        type=int,
        help="how long problems are: people of stories, 1 to 5, or letters of book, 4 to 12 (default: the longest)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of training and of the problems (default: 0)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the lab draws a chart with matplotlib: pip install 'hf-elastic[lab]'")
    args.train = args.train or args.from_scratch  # the family in the package is of the model in the package
    if (args.train or args.quantize == "nvfp4") and importlib.util.find_spec("trl") is None:
        raise ImportError("training needs trl: pip install 'hf-elastic[train]'")
    if args.learn_sizes and not args.train:
        raise ValueError("--learn-sizes needs --train.")
    _check(args)
    if Path(args.output).is_file():
        raise ValueError(f"--output={args.output} is a file; give a folder.")
    import torch
    from transformers.utils import logging

    from ..lab.chart import accuracy_chart
    from ..lab.family import make_family
    from ..lab.tasks import get_task
    from ..lab.tour import run_tour

    torch.set_num_threads(1)  # the model is so small that a second thread waits more than it works
    logging.set_verbosity_error()  # the notes about optional CUDA kernels would bury the results
    logging.disable_progress_bar()
    quiet, task = args.json, get_task(args.task)
    low, high = task.trained
    args.size = high if args.size is None else args.size
    args.steps = task.family_steps if args.steps is None else args.steps
    if not low <= args.size <= high:
        raise ValueError(
            f"--size={args.size} must be in {low}..{high}, the {task.unit} that the model was trained on."
        )
    say = (lambda text: None) if quiet else functools.partial(print, flush=True)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    example = next(task.problems("heldout", task.shown, args.seed))
    say(_WELCOME.format(count=_IN_WORDS[1 + len(task.sizes)], task=task.explain(example)))
    say(f"1/4  The model: {'trained here' if args.from_scratch else 'from the package, which has it trained'}.")
    parent, tokenizer = _parent(task, args.from_scratch, args.seed, progress=not quiet)
    say(
        f"     {parent.num_parameters():,} parameters in {parent.config.num_hidden_layers} layers, {_layers(parent.config)}."
    )
    say(
        "     Made elastic: it reads 256 texts to see which channels, heads and neurons matter, and sorts its weights so that every"
    )
    say("     size is the first part of each matrix. What the model computes stays the same ...")
    untrained = make_family(parent, tokenizer, task=task, seed=args.seed)
    say("2/4  The family: all sizes learn together, from what the whole model would write.")
    trained = _train(task, untrained, tokenizer, output, args, say) if args.train else None
    family = trained[0] if trained else load_shipped(task, say)
    say(
        f"3/4  Every size solves {args.problems} problems of {args.size} {task.unit} that were in no training, twice: cut from the files,"
    )
    say("     and switched live inside the whole model. Both have to write the same ...")
    results = run_tour(
        parent,
        untrained,
        family,
        tokenizer,
        output,
        count=args.problems,
        task=task,
        size=args.size,
        seed=args.seed,
        say=say,
    )
    accuracy_chart(results, output / "accuracy.png")
    say(f"4/4  Results.\n{render(results, output)}")
    if trained:
        results["family"] = trained[1]
    if args.learn_sizes:
        results["learned"] = _learn(parent, tokenizer, output, args, say)
    if args.quantize:
        from .lab_formats import quantize_sizes

        results["quantized"] = quantize_sizes(family if args.train else None, tokenizer, output, args, say)
    if quiet:
        print(json.dumps(results, indent=2))


_WELCOME = """\
This lab shows one checkpoint that holds {count} sizes of a small model. It takes about a minute on one CPU core and needs no network.

{task}
"""


_IN_WORDS = {3: "three", 4: "four"}
_KINDS = {"conv": "short convolutions", "full_attention": "attention", "linear_attention": "Mamba", "moe": "experts"}


def _check(args: argparse.Namespace) -> None:
    """What can be said before anything is loaded."""
    for option in ("learn_sizes", "quantize"):
        if getattr(args, option) and args.task != "book":
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is for --task book: the family of {args.task} has no sizes made for it.")
    if args.steps is not None and args.steps < 4:
        raise ValueError(f"--steps={args.steps} must be at least 4.")
    if args.problems < 1:
        raise ValueError(f"--problems={args.problems} must be at least 1.")


def _layers(config: Any) -> str:
    """`5 short convolutions, 3 attention`."""
    kinds = getattr(config, "layers_block_type", None) or config.layer_types
    found = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return ", ".join(f"{count} {_KINDS.get(kind, kind)}" for kind, count in found.items())


def load_shipped(task: Any, say: Any) -> Any:
    """The trained family of the package."""
    from ..lab.family import load_family

    family, _ = load_family(task)
    say("     Taken from the package, which has it trained; with --train the lab does it here, in about 10 minutes.")
    return family


def _train(
    task: Any, untrained: Any, tokenizer: Any, output: Path, args: argparse.Namespace, say: Any
) -> tuple[Any, dict[str, Any]]:
    """Learn the family, and measure it before and after."""
    from ..lab.chart import family_chart
    from ..lab.family import BETWEEN, measure_family, train_family

    start = time.perf_counter()
    measured = {"full": None, **{name: name for name in task.sizes}}
    if task.name == "book":
        measured["between"] = BETWEEN
    options = {"count": args.problems, "size": args.size, "seed": args.seed, "task": task}
    say(f"     Training {', '.join(['full', *task.sizes])} in one run of {args.steps} steps ...")
    before = measure_family(untrained, tokenizer, measured, **options)
    family = copy.deepcopy(untrained)
    history = train_family(
        family, tokenizer, output / "trainer", task=task, steps=args.steps, seed=args.seed, progress=not args.json
    )
    results = {
        "task": {task.unit: args.size, "problems": args.problems, "seed": args.seed},
        "steps": args.steps,
        "untrained": before,
        "trained": measure_family(family, tokenizer, measured, **options),
        "history": _curves(history),
        "seconds": round(time.perf_counter() - start, 1),
    }
    (output / "family.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    family_chart(results, output / "family.png")
    say(render_family(results, output))
    return family, results


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
    options = {"count": args.problems, "size": args.size, "seed": args.seed}
    trained = measure_family(family, tokenizer, {"full": None, **{name: name for name in ROUTER_TARGETS}}, **options)
    family.save_pretrained(output / "learned")
    tokenizer.save_pretrained(output / "learned")
    results = {
        "task": {"letters": args.size, "problems": args.problems, "seed": args.seed},
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
    rows = [[*_COLUMNS, "target", "off by", *_RATES, "what is kept"]]
    for entry in results["trained"]:
        name, params, active, share, *rest = _row(entry, whole)
        row = decided.get(name)
        target = [f"{row['target_value']:,.0f} {row['quantity']}", f"{row['miss']:+.1%}"] if row else ["", ""]
        rows.append([name, params, active, share, *target, *rest])
    return "\n".join(
        [
            "",
            table(rows, right=frozenset(range(1, 8))),
            "",
            *(f"{name}: {row['why']}" for name, row in decided.items()),
            f"a router decided the sizes after {results['router_steps']} of {results['steps']} steps. Took {results['seconds']:.0f} s;",
            f"see {output / 'learned.json'}; the checkpoint, with its router, is {output / 'learned'}",
        ]
    )


def render_family(results: dict[str, Any], output: Path) -> str:
    """The trained family as text."""
    whole = results["trained"][0]
    named = {entry["name"] for entry in results["trained"]}
    between = ", and `between` a size that was never trained" if "between" in named else ""
    rows = [[*_COLUMNS, "untrained", *_RATES, "what is kept"]]
    for before, entry in zip(results["untrained"], results["trained"], strict=True):
        name, params, active, share, *rest = _row(entry, whole)
        rows.append([name, params, active, share, f"{before['exact']:.2f}", *rest])
    return "\n".join(
        [
            "",
            table(rows, right=frozenset(range(1, 7))),
            "",
            f"One run of {results['steps']} steps for all sizes; `untrained` is the share of answers right before it{between}.",
            f"Took {results['seconds']:.0f} s; see {output / 'family.png'} and {output / 'family.json'}.",
        ]
    )


def _parent(task: Any, from_scratch: bool, seed: int, progress: bool) -> tuple[Any, Any]:
    from ..lab.parent import load_parent, train_parent

    if not from_scratch:
        return load_parent(task)
    model, _ = train_parent(task, seed=seed, steps=task.parent_steps, progress=progress)
    return model.eval(), task.build_tokenizer()


_COLUMNS = ["size", "parameters", "active", "share"]
_RATES = ["answers right", "thinking right"]


def _row(entry: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """Name, parameters, active ones, their share, two accuracies, and the sizes in which a budget differs from the whole parent."""
    changed = {axis: size for axis, size in entry["sizes"].items() if whole["sizes"].get(axis) != size}
    return [
        entry["name"],
        f"{entry['total_params']:,}",
        f"{entry['active_params']:,}",
        f"{entry['active_params'] / whole['active_params']:.0%}",
        *(f"{entry[key]:.2f}" for key in ("exact", "trace")),
        " ".join(f"{axis}={size}" for axis, size in changed.items()) or "the whole model",
    ]


def render(results: dict[str, Any], output: Path) -> str:
    """The results as text."""
    whole, contrast = results["budgets"][0], results["untrained"]
    rows = [[*_COLUMNS, *_RATES, "what is kept"]]
    rows += [_row(entry, whole) for entry in results["budgets"]]
    rows.append([f"{contrast['name']}, only cut", *_row(contrast, whole)[1:]])
    task, export, example = results["task"], results["export"], results["example"]
    live = max(entry["live_difference"] for entry in results["budgets"])
    return "\n".join(
        [
            "",
            table(rows, right=frozenset(range(1, 6))),
            "",
            "active: the parameters that one token uses. share: of the whole model's active ones.",
            f"right: the share of {task['problems']} problems in which all of the answer, or all of the thinking, was right.",
            f"{contrast['name']}, only cut: the same size before training. It is the training that makes small sizes work.",
            "",
            *_solved(example),
            *_clocked(results["clock"]),
            "",
            "Checked:",
            f"  sorting changed nothing: outputs of the sorted and the original model differ by {results['sorted_parent_difference']:.0e} "
            "(rounding)",
            f"  a size switched live is the size cut from the files: same weights and answers, outputs differ by {live:.0e}",
            f"  {export['budget']} as a plain checkpoint, in transformers alone without hf_elastic: outputs differ by {export['difference']:.0e}",
            "",
            f"It took {results['seconds']:.0f} s. To look at: {output / 'accuracy.png'} and {output / 'results.json'}. To go on:",
            f"  hf-elastic plan {output / 'elastic'}",
            f'  hf-elastic generate {output / "elastic"} "{example["prompt"]}" --budget {results["budgets"][1]["name"]}',
        ]
    )


def _solved(example: dict[str, Any]) -> list[str]:
    """One question as several sizes answer it: in a table if it is short, or else one after the other."""
    word = {True: "right", False: "wrong"}
    if len(example["prompt"]) < 40:
        rows = [["who writes", "thinking", "answer", "cost", ""]]
        for line in example["lines"]:
            rows.append([line["who"], line["thinking"], line["answer"], f"{line['cost']:.0%}", word[line["right"]]])
        return [f"The example {example['prompt']}, whose answer is {example['answer']}:", "", table(rows), "", _COST]
    said = ["One question, as several sizes answer it:", "", f"  {example['prompt']}", ""]
    for line in example["lines"]:
        said += [
            f"  {line['who']}: {word[line['right']]}, at {line['cost']:.0%} of the cost",
            f"    thinks   {_short(line['thinking'])}",
            f"    answers  {_short(line['answer'])}",
            "",
        ]
    return [*said, _COST]


def _short(text: str, most: int = 110) -> str:
    return f"{text[:most]} ..." if len(text) > most + 30 else text or "nothing"


_COST = "cost: active parameters x tokens written, against the whole model alone."


def _clocked(clock: dict[str, Any]) -> list[str]:
    alone, plan = clock["alone_seconds"], clock["plan_seconds"]
    who = f"{clock['thinking']} thinks and {clock['answering']} answers"
    times = f"{clock['alone']} alone takes {alone:.2f} s for a question on this machine; {plan:.2f} s if {who}"
    if plan < 0.95 * alone:
        return ["", f"{times}: {alone / plan:.1f} times as fast."]
    return ["", f"{times}: not faster, because a model this small takes about the same time at every width."]
