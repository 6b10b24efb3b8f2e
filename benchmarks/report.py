"""Write what README, docs and model cards say of results from the files in `results/`, so that no number there is typed by hand.

`python benchmarks/report.py` rewrites the blocks between markers (`<!-- results:begin -->` to `<!-- results:end -->`, and the same for
`numbers`, `family`, `ablations`, `baselines`, `bytes`, `text`, `phases`, `handover` and `formats`) and draws the charts of `docs/assets/`; `--check` only tells whether the texts are up to date.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from baseline_report import baselines
from markdown_tables import conditions as _conditions
from markdown_tables import spread as _spread
from markdown_tables import table as _table
from phase_report import phases
from result_files import RESULTS, ROOT, SIZES, WAYS, Result, by_name, load

DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "measured.md",
    ROOT / "docs" / "evidence.md",
    ROOT / "docs" / "quantization.md",
    ROOT / "model_cards" / "lab_family.md",
)

GROUPS = {
    "Loading and downloading": ("loading", "nested_layout", "hub_fetch", "quantization_codec"),
    "Running": ("switching", "gpu", "handover", "speculation", "quantization_packed"),
    "Training": (
        "training",
        "handover_training",
        "ablation_stages",
        "ablation_sampling",
        "ablation_sorting",
        "ablation_depth",
        "ablation_router",
        "quantization_activations",
    ),
    "How good": (
        "lab_family",
        "baselines_book",
        "baselines_stories",
        "recipe_cup",
        "recipe_book",
        "recipe_stories",
        "byte_lm",
        "text_lm",
        "text_lm_gpu",
        "phases",
        "quantization_accuracy",
    ),
}
"""Result files in the order of `docs/measured.md`."""

NUMBERS = (
    (
        "Time to load half of a model (CPU, from the disk), against a checkpoint of that size alone",
        "loading",
        "slice / export, cold files: time until read",
    ),
    (
        "Bytes that a download of half of a model moves, against its weights",
        "hub_fetch",
        "bytes sent for the half budget, nested layout / bytes of its weights",
    ),
    (
        "Memory of a Nemotron 30B and all its sizes on a GPU, against the 30B alone",
        "gpu",
        "memory of the parent and all sizes on the GPU / its weights",
    ),
    (
        "Time per token at a live size (CPU, bfloat16; 1.06 to 1.11 in float32), against the stock model of that size",
        "switching",
        "decode time per token in bfloat16, budget / stock model of that size",
    ),
)
"""The README's numbers: what is asked, the result file, and the claim in it."""


def render(name: str, results: Path = RESULTS) -> str:
    """The text of one block."""
    return _BLOCKS[name](results)


# -- blocks ------------------------------------------------------------------------------------------------------------


def claims(results: Path) -> str:
    """A section per result file: what was asked, the claims with what was measured, and on what."""
    paths = {path.stem: path for path in sorted(results.glob("*.json"))}
    grouped = {group: [name for name in names if name in paths] for group, names in GROUPS.items()}
    listed = {name for names in grouped.values() for name in names}
    grouped["Other"] = [name for name in paths if name not in listed]
    parts = []
    for group, names in grouped.items():
        parts += [f"## {group}"] * bool(names)
        for name in names:
            result = load(paths[name])
            table = _table(["claim", "measured", "limit", ""], [_claim(claim) for claim in result["claims"]])
            parts.append(f"### {name}\n\n{_question(name)}\n\n{table}\n\n{_conditions(result)}")
    return "\n\n".join(parts) + "\n" if parts else "No benchmark was run yet.\n"


def numbers(results: Path) -> str:
    """The numbers of the README, each with a link to the section it is from."""
    rows = []
    for question, name, claim in NUMBERS:
        if (result := load(results / f"{name}.json")) is not None:
            (value,) = (entry["value"] for entry in result["claims"] if entry["name"] == claim)
            rows.append([question, f"{value:.2f}", f"[{name}](docs/measured.md#{name})"])
    if (result := load(results / "lab_family.json")) is not None:
        found = by_name(result)
        third, split = (found[f"{way}: third, exact"] for way in ("family", "split"))
        question = (
            f"Problems solved by a size with {third['active_params'][0] / found['family: full, exact']['active_params'][0]:.0%} of the active "
            "parameters, trained in one run with all others; in brackets: trained alone, in a quarter of the steps (mean of "
            f"{len(split['runs'])} seeds, {min(split['runs']):.2f} to {max(split['runs']):.2f})"
        )
        rows.append(
            [
                question,
                f"{third['mean']:.2f} ({split['mean']:.2f})",
                "[evidence](docs/evidence.md#one-run-for-all-sizes)",
            ]
        )
    return _table(["", "measured", "from"], rows) + "\n" if rows else "Not measured yet.\n"


def family(results: Path) -> str:
    """Exact answers per size and way to get it: the mean over seeds, and the range where they differ."""
    if (result := load(results / "lab_family.json")) is None:
        return "Not measured yet.\n"
    found = by_name(result)
    whole = found["family: full, exact"]
    rows = []
    for size in SIZES:
        entry = found[f"family: {size}, exact"]
        share = entry["active_params"][0] / whole["active_params"][0]
        cells = [_spread(found.get(f"{way}: {size}, exact")) for way in WAYS]
        rows.append([f"{size} ({share:.0%})", *cells])
    text = _table(["size (active)", *WAYS.values()], rows)
    about = (
        f"{whole['problems']} held-out problems of 12 lines, whole answer right, by generation; mean of seeds "
        f"{', '.join(map(str, whole['seeds']))} (range); {whole['steps']} steps a run. `between` was never trained."
    )
    chosen = [_sizes(found[f"router: {size}, exact"]["sizes"][0]) for size in SIZES[1:4]]
    learned = f"Sizes the router chose with seed {whole['seeds'][0]}: " + "; ".join(
        f"{size} {sizes}" for size, sizes in zip(SIZES[1:4], chosen, strict=True)
    )
    return f"{text}\n\n{about} {learned}.\n\n{_conditions(result)}\n"


def ablations(results: Path) -> str:
    """Divergence from the parent and exact answers of every ablation, a table each."""
    parts = []
    for path in sorted(results.glob("ablation_*.json")):
        found = by_name(load(path) or {})
        names = [name.removesuffix(", exact") for name in found if name.endswith(", exact")]
        ways = list(dict.fromkeys(name.rpartition(": ")[0] for name in names))
        sizes = list(dict.fromkeys(name.rpartition(": ")[2] for name in names))
        if len(sizes) < len(ways):  # a row per way
            rows = [[name.rpartition(":")[0], *_rates(found, name)] for name in names]
            text = _table([f"`{path.stem}`", "exact", "divergence"], rows)
        else:
            head = [f"`{path.stem}`"]
            head += [f"{way}: {rate}" for way in ways for rate in ("exact", "divergence")]
            text = _table(
                head, [[size, *(c for way in ways for c in _rates(found, f"{way}: {size}"))] for size in sizes]
            )
        parts.append(text)
    return "\n\n".join(parts) + "\n" if parts else "Not measured yet.\n"


def recipes(results: Path) -> str:
    """Whole answers and divergence of every size by the recipe that all of them were trained with, a table per task."""
    parts = []
    for path in sorted(results.glob("recipe_*.json")):
        result = load(path) or {}
        found = by_name(result)
        names = [name.removesuffix(", exact").rpartition(": ")[::2] for name in found if name.endswith(", exact")]
        ways, sizes = (list(dict.fromkeys(column)) for column in zip(*names, strict=True))
        rows = []
        for way in ways:
            cells = [_spread(found.get(f"{way}: {size}, exact")) for size in sizes]
            kls = [found.get(f"{way}: {size}, kl") for size in sizes]
            cells = [f"{cell} · {kl['mean']:.3f}" if kl else cell for cell, kl in zip(cells, kls, strict=True)]
            about = next(found[f"{way}: {size}, exact"] for size in sizes if f"{way}: {size}, exact" in found)
            steps = "" if way == "parent" else f"{about['steps']}{' each' if way == 'alone' else ''}"
            rows.append([way, steps, *cells, str(len(about["seeds"]))])
        text = _table([f"`{path.stem.removeprefix('recipe_')}`", "steps", *sizes, "seeds"], rows)
        parts.append(f"{text}\n\n{_conditions(result)}")
    return "\n\n".join(parts) + "\n" if parts else "Not measured yet.\n"


def byte_lm(results: Path) -> str:
    """Bits and perplexity per byte of real text."""
    if (result := load(results / "byte_lm.json")) is None:
        return "Not measured yet.\n"
    found = by_name(result)
    rows = []
    ways = {"family": "one run", "split": "alone, tokens split", "untrained": "not trained"}
    for size in SIZES[:4]:
        active = found[f"family: {size}, bits per byte"]["active_params"]
        cells = []
        for way in ways:
            bits = found.get(f"{way}: {size}, bits per byte")
            cells.append(f"{bits['median']:.3f} ({2 ** bits['median']:.2f})" if bits else "")
        rows.append([f"{size} ({active:,} active)", *cells])
    about = found["family: full, bits per byte"]
    text = _table(["bits (perplexity) per byte", *ways.values()], rows)
    return (
        f"{text}\n\n{about['held_out_bytes']:,} held-out bytes of Python's standard library; {about['steps']} steps.\n"
    )


def text_lm(results: Path) -> str:
    """Bits per byte of real text at each scale that was measured, a table each."""
    names = ("text_lm", "text_lm_gpu")
    parts = [_text(result) for name in names if (result := load(results / f"{name}.json")) is not None]
    return "\n\n".join(parts or ["Not measured yet."]) + "\n"


def _text(result: Result) -> str:
    found = by_name(result)
    ways = {"family": "one run", "split": "alone, as many steps in all", "untrained": "not trained"}
    if "split: half, bits per byte" not in found:
        del ways["split"]
    whole = found["family: full, bits per byte"]
    rows = []
    for size in SIZES[:4]:
        entry = found[f"family: {size}, bits per byte"]
        values = [found.get(f"{way}: {size}, bits per byte") for way in ways]
        cells = ["" if value is None else _spread(value | {"mean": fmean(value["runs"])}, 3) for value in values]
        millions, share = entry["active_params"] / 1e6, entry["active_params"] / whole["active_params"]
        rows.append([f"{size} ({millions:.1f}M, {share:.0%})", *cells])
    train, held_out = found["text to train on"], found["text held out, measured"]
    scale, seeds = train["scale"], whole["seeds"]
    packages = ", ".join(f"{name.partition(':')[2] or name} {version}" for name, version in train["packages"].items())
    alone = (
        f"{whole['alone_steps']} for each of the three sizes alone"
        if "split" in ways
        else "no runs of sizes alone yet"
    )
    gzip, xz = (found[f"{name} of all held-out files in one, bits per byte"]["median"] for name in ("gzip -9", "xz"))
    about = (
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}. Steps have {scale['batch'] * scale['row']:,} tokens: {scale['steps']} for the parent (from scratch), "
        f"{scale['family_steps']} for the family, {alone}. Measured on {held_out['median']:,} bytes of "
        f"{held_out['files']:,} held-out files, in rows of {scale['row']} tokens of a vocabulary of {scale['vocabulary']:,}; `gzip -9` packs these files to {gzip:.2f} bits per byte, `xz` to {xz:.2f}. "
        f"Training rows are drawn from {train['median'] / 1e6:.0f} MB in {train['files']:,} files of {packages}."
    )
    table = _table(["bits per byte (parameters)", *ways.values()], rows)
    return f"{table}\n\n{about}\n\n{_conditions(result)}"


def handover(results: Path) -> str:
    """Whole answers of every pair of sizes by how the second took over, and the time until its first token."""
    if (result := load(results / "handover.json")) is None:
        return "Not measured yet.\n"
    found = by_name(result)
    ways = ("re-prefill", "as is", "scaled", "trained re-prefill", "trained")
    head = ["thinks → answers", "read again", "cache as is", "cache, scaled", "trained: read again", "trained: cache"]
    rows = []
    for thinker in SIZES[:4]:
        for answerer in SIZES[:4]:
            if thinker != answerer:
                cells = [f"{found[f'{way}: {thinker} > {answerer}, exact']['mean']:.2f}" for way in ways]
                rows.append([f"{thinker} → {answerer}", *cells])
    entry = found["re-prefill: half > full, exact"]
    about = f"Whole answers right, {entry['problems']} problems, mean of seeds {', '.join(map(str, entry['seeds']))}."
    times = []
    for length in (1024, 4096, 16384):
        cache, again = (
            found[f"first answer token after {length} tokens: {way}"]["median"] for way in ("cache", "reprefill")
        )
        times.append(f"{length:,} tokens: {cache:.2f} s against {again:.1f} s")
    return (
        f"{_table(head, rows)}\n\n{about}\n\nTime to the first token of the answer by cache, against reading again, of a random model of "
        f"{found['first answer token after 1024 tokens: cache']['full'] / 1e6:.0f}M parameters on a CPU: {'; '.join(times)}.\n\n{_conditions(result)}\n"
    )


def handover_training(results: Path) -> str:
    """What training hand-over costs each size and how near a hand-over comes to reading again; and what conversions without training do."""
    if (result := load(results / "handover_training.json")) is None:
        return "Not measured yet.\n"
    found, ways = by_name(result), ("plain", "both trained", "both trained, always", "second trained, always")
    parts = []
    for task in dict.fromkeys(name.partition(",")[0] for name in found if ", plain: " in name):
        sizes, pairs = [], []
        for name in found:
            pair, comma, rate = name.removeprefix(f"{task}, plain: ").partition(", ")
            if name.startswith(f"{task}, plain: ") and comma:
                thinker, _, answerer = pair.partition(" > ")
                sizes += [pair] * (thinker == answerer)
                pairs += [pair] * (rate == "cache")
        there = [way for way in ways if f"{task}, {way}: {sizes[0]}, again" in found]
        rows = [
            [pair.partition(" > ")[0], *(_spread(found[f"{task}, {way}: {pair}, again"], 3) for way in there)]
            for pair in sizes
        ]
        entry = found[f"{task}, plain: {sizes[0]}, again"]
        head = ["size alone", "no hand-over", "half the batches", "all batches", "all, only the second size learns"]
        about = (
            f"`{task}`: right solutions of {entry['problems']} held-out problems after {entry['steps']} more steps of the trained family; mean of seeds "
            f"{', '.join(map(str, entry['seeds']))} (range). "
            + ("All batches: seeds 0 and 1; where only the second size learns: seed 0." if task == "book" else "")
        )
        parts += [_table(head[: 1 + len(there)], rows), about]
        rows = []
        for pair in pairs:
            cells = []
            for way in ("plain", "both trained"):
                cells += [_spread(found[f"{task}, {way}: {pair}, {rate}"], 3) for rate in ("again", "cache")]
            rows.append([pair.replace(">", "→"), *cells])
        head = ["thinks → answers", "no hand-over: read again", "cache", "half the batches: read again", "cache"]
        parts.append(_table(head, rows))
    converted = [name for name in found if name.startswith("book, as is: ")]
    kinds = {
        "again": "read again",
        "as is": "as is",
        "formula": "formula",
        "least squares, head": "least squares: head",
        "least squares, channel": "channel",
        "least squares, matrix": "matrix",
        "fitted, channel": "fitted: channel",
        "fitted, matrix": "matrix",
    }
    rows = []
    for name in converted:
        pair = name.removeprefix("book, as is: ")
        cells = [f"{found[f'book, {way}: {pair}']['median']:.2f}" for way in kinds]
        rows.append([pair.replace(">", "→"), *cells])
    if rows:
        parts.append(
            "Conversions of a cache that leave the weights as they are (`book`, the family that ships, one seed):"
        )
        parts.append(_table(["thinks → answers", *kinds.values()], rows))
    return "\n\n".join([*parts, _conditions(result)]) + "\n"


def formats(results: Path) -> str:
    """Whole answers and divergence of every size in every format, and bytes."""
    if (result := load(results / "quantization_accuracy.json")) is None:
        return "Not measured yet.\n"
    found = by_name(result)
    sizes = list(dict.fromkeys(name.split(": ")[1].partition(",")[0] for name in found if ": " in name))
    whole = found[f"float32: {sizes[0]}, exact"]
    shares = [found[f"float32: {size}, exact"]["active_params"] / whole["active_params"] for size in sizes]
    rows = []
    for way, done in FORMATS.items():
        cells = [f"{_spread(found[f'{way}: {size}, exact'], 3)} · {_mean_kl(found, way, size)}" for size in sizes]
        rows.append([way, *cells, done])
    stored = {
        way: [f"{found[f'{way}: {size}, exact']['stored_bytes'] / 1000:.0f}" for size in sizes]
        for way in ("bfloat16", "fp8", "nvfp4", "nvfp4, everything")
    }
    text = _table(["", *(f"{size} ({share:.0%})" for size, share in zip(sizes, shares, strict=True)), ""], rows)
    seeds = ", ".join(map(str, found[f"nvfp4, distilled: {sizes[0]}, exact"]["seeds"]))
    error = (0.99 * 0.01 / whole["problems"]) ** 0.5
    about = (
        f"Share of {whole['problems']} held-out problems whose whole answer is right · divergence from the whole model in nats per token; "
        f"`nvfp4, distilled`: mean of seeds {seeds} (range). The standard error of a rate of 0.99 is {error:.3f}. In brackets behind sizes: active "
        "parameters. Kilobytes of the weights of these sizes: "
        + "; ".join(f"{way} {' / '.join(numbers)}" for way, numbers in stored.items())
    )
    return f"{text}\n\n{about}.\n\n{_conditions(result)}\n"


def _mean_kl(found: Mapping[str, Any], way: str, size: str) -> str:
    return f"{found[f'{way}: {size}, kl']['mean']:.4f}"


FORMATS = {
    "float32": "Nothing is quantised; all below but the next row compute in float32, too.",
    "bfloat16": "The same weights, computed with in bfloat16.",
    "fp8": "Every kind of weight in FP8 by calibration alone: nothing is trained.",
    "nvfp4": "The default recipe by calibration alone; attention and the Mamba layer that feeds it are kept.",
    "nvfp4, everything": "The same with attention and that layer in 4 bits as well.",
    "nvfp4, distilled": "The default recipe after 150 steps of distillation of the rounded weights.",
    "nvfp4, everything, distilled": "Everything in 4 bits after 150 such steps, one seed.",
    "nvfp4, not rounded": "The control: as many steps without rounding, then the default recipe, one seed.",
}
"""Rows of the table of formats, and what was done."""

_BLOCKS: Mapping[str, Callable[[Path], str]] = {
    "results": claims,
    "numbers": numbers,
    "family": family,
    "ablations": ablations,
    "baselines": baselines,
    "recipes": recipes,
    "bytes": byte_lm,
    "text": text_lm,
    "phases": phases,
    "handover": handover,
    "handover_training": handover_training,
    "formats": formats,
}


# -- how ---------------------------------------------------------------------------------------------------------------


def _rates(found: Mapping[str, Any], name: str) -> list[str]:
    if f"{name}, exact" not in found:
        return ["", ""]
    return [f"{found[f'{name}, exact']['median']:.2f}", f"{abs(found[f'{name}, kl']['median']):.4f}"]


def _sizes(sizes: Mapping[str, Any]) -> str:
    cut = ("hidden", "expert_ffn", "shared_expert_ffn", "mamba_heads")
    return ", ".join(f"{axis} {sizes[axis]}" for axis in cut)


def _claim(claim: Mapping[str, Any]) -> list[str]:
    return [
        claim["name"],
        f"{claim['value']:.3g}",
        f"{claim['limit']:.3g}",
        "holds" if claim["holds"] else "**fails**",
    ]


def _question(name: str) -> str:
    """What a script asks: the first paragraph of its docstring. A script that has a result per task is found without the task's name."""
    if not (ROOT / "benchmarks" / f"{name}.py").exists():
        name = name.rpartition("_")[0]
    doc = ast.get_docstring(ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return f"{' '.join(doc.split(chr(10) * 2)[0].split())} Script: `benchmarks/{name}.py`."


def written(text: str) -> str:
    """A document with all its blocks as they should be."""
    for name in _BLOCKS:
        block = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        text = block.sub(lambda match, name=name: match[1] + render(name) + match[2], text)  # type: ignore[misc]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a document is not up to date")
    args = parser.parse_args()
    stale = [
        path for path in DOCUMENTS if written(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")
    ]
    if args.check:
        return int(bool(stale))
    for path in stale:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
    from figures import draw

    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
