"""The nested layout: the same weights in as many bytes, and loaded as fast.

A random `nemotron_h` MoE parent in the proportions of Nemotron Nano v3 (bfloat16, more than 2 GB, one tensor per expert) nests budgets of about
three quarters and half its bytes. It is saved in the stock layout, from there in the nested one, and from there in the stock one again
(`reassembled`). All sizes of the first two are compared tensor by tensor, and the whole of the third.

Then the whole parent is loaded from the stock and from the nested layout, in processes of their own, in turns, with the files in the page
cache (`warm`) and out of it (`cold`). Two times are taken, as in `loading.py`: `returned`, when `from_pretrained` is back, and `read`, when a
value on every page of every weight has been read as well. The stock layout only maps what is not stacked, so `read` is what compares.

Claims: no tensor differs; bytes of the nested files / of the stock files at most 1.01; time until read, nested / stock, at most 1.2, cold and
warm; peak anonymous memory of loading half of the nested layout / bytes of its weights at most 1.1.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import Claim, Report, arguments, in_turns
from loading import report_times, timed
from processes import ChildRun, drop_page_cache, in_child
from synthetic import half_budget, nano_like, write_checkpoint
from transformers import AutoModelForCausalLM

from hf_elastic import ElasticConfig

DIFFERENT = "tensors that differ between nested, stock and re-assembled checkpoints"
BYTES = "bytes of the nested files / bytes of the stock files"
TIME = "nested / stock, the whole parent, {} files: time until read"
PEAK = "peak anonymous memory of loading half of the nested layout / bytes of its weights"
CLAIMS = [
    Claim(DIFFERENT, 0, "=="),
    Claim(BYTES, 1.01),
    *(Claim(TIME.format(cache), 1.2) for cache in ("cold", "warm")),
    Claim(PEAK, 1.1),
]
BUDGETS = (None, "three quarters", "half")

transformers.logging.set_verbosity_error()  # also in the child processes, which import this module
transformers.logging.disable_progress_bar()


def main() -> int:
    options = arguments(__doc__).parse_args()
    parent = nano_like(torch.bfloat16, scale=8, experts=16) if options.quick else nano_like(torch.bfloat16)
    report = Report("nested_layout", CLAIMS)
    with tempfile.TemporaryDirectory(prefix="hf-elastic-nested-") as scratch:
        folders = {name: Path(scratch, name) for name in ("stock", "nested", "reassembled")}
        in_child(_prepare, folders, parent)
        compare(report, folders)
        time(report, folders, 2 if options.quick else 9)
    return report.finish(options)


def compare(report: Report, folders: dict[str, Path]) -> None:
    """Sizes of the files, and every tensor of every size."""
    sizes = {
        name: sum(file.stat().st_size for file in folder.rglob("*.safetensors")) for name, folder in folders.items()
    }
    for name, size in sizes.items():
        report.measure(f"bytes of the {name} files", "bytes", [size])
    report.settle(BYTES, sizes["nested"] / sizes["stock"])
    for budget, files in ElasticConfig.from_pretrained(folders["nested"]).elastic["files"].items():
        report.measure(f"bytes of the files of {budget}", "bytes", [sum(files.values())])
    differences = [
        in_child(_differences, folders[name], folders["stock"], budget).result
        for name, budgets in (("nested", BUDGETS), ("reassembled", (None,)))
        for budget in budgets
    ]
    report.settle(DIFFERENT, sum(differences))


def time(report: Report, folders: dict[str, Path], rounds: int) -> None:
    """Measure both layouts in turns, cold and warm."""
    for cache in ("cold", "warm"):
        layouts = ("stock", "nested")
        actions = {name: partial(_run, folders[name], None, cache == "cold") for name in layouts}
        if cache == "warm":
            in_turns(actions, 1)  # fills the page cache
        runs = in_turns(actions, rounds)
        medians = report_times(report, runs, cache, "layout")
        for moment in ("returned", "read"):
            ratio = medians["nested", moment] / medians["stock", moment]
            report.measure(f"nested / stock, {cache} files: time until {moment}", "", [ratio], cache=cache)
        report.settle(TIME.format(cache), medians["nested", "read"] / medians["stock", "read"])
    half = ElasticConfig.from_pretrained(folders["stock"]).costs()["half"].weight_bytes(torch.bfloat16)
    peaks = [_run(folders["nested"], "half", False).peak_anonymous_bytes / half for _ in range(rounds)]
    report.settle(PEAK, report.measure(PEAK, "", peaks))


def _run(folder: Path, budget: str | None, cold: bool) -> ChildRun:
    files = sorted(folder.rglob("*.safetensors"))
    return in_child(_load, folder, budget, before=partial(drop_page_cache, files) if cold else None)


# -- in processes of their own -----------------------------------------------------------------------------------------


def _prepare(folders: dict[str, Path], parent: transformers.NemotronHConfig) -> None:
    folders["stock"].mkdir()
    half = half_budget(parent)
    widths = {"hidden": parent.hidden_size, "expert_ffn": parent.moe_intermediate_size}
    more = {axis: (half[axis] + whole) // 16 * 8 for axis, whole in widths.items()}
    write_checkpoint(folders["stock"], parent, {"three quarters": more, "half": half})
    AutoModelForCausalLM.from_pretrained(folders["stock"]).save_pretrained(folders["nested"], layout="nested")
    AutoModelForCausalLM.from_pretrained(folders["nested"]).save_pretrained(folders["reassembled"])


def _differences(left: Path, right: Path, budget: str | None) -> int:
    mine, theirs = (AutoModelForCausalLM.from_pretrained(f, budget=budget).state_dict() for f in (left, right))
    names = mine.keys() | theirs.keys()
    return sum(name not in mine or name not in theirs or not torch.equal(mine[name], theirs[name]) for name in names)


def _load(folder: Path, budget: str | None) -> dict[str, Any]:
    return timed(lambda: AutoModelForCausalLM.from_pretrained(folder, budget=budget))


if __name__ == "__main__":
    sys.exit(main())
