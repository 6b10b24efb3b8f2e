"""The nested layout: the same weights in as many bytes, and loaded as fast.

A random `nemotron_h` MoE parent as wide as Nemotron Nano v3, with fewer layers and experts (bfloat16, 3.4 GB, one tensor per expert), nests the
23B and 12B sizes of the family released with it. It is saved in the stock layout, from there in the nested one, and from there in the
stock one again (`reassembled`). All sizes of the first two are compared tensor by tensor, and the whole of the third.

Then the whole parent is loaded three ways, in processes of their own, in turns, with the files in the page cache (`warm`) and out of it
(`cold`):

- `stock`: the stock checkpoint, by the stock class of transformers, as whoever has no elastic checkpoint loads it;
- `layout`: the elastic checkpoint in the stock layout, the same files, by this package;
- `nested`: the elastic checkpoint in the nested layout.

Two times are taken, as in `loading.py`: `returned`, when `from_pretrained` is back, and `read`, when a value on every page of every weight has
been read as well. The stock class only maps what is not stacked, so `read` is what compares.

Claims: no tensor differs; bytes of the nested files / of the stock files at most 1.01; time until read at most 1.2 of either of the others, cold
and warm; peak anonymous memory of loading the 12B size of the nested layout / bytes of its weights at most 1.1.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import Claim, Report, arguments, in_turns
from loading import report_times, timed
from processes import ChildRun, backed_memory, drop_page_cache, in_child
from synthetic import published_family, write_checkpoint, write_stock
from transformers import AutoModelForCausalLM

from hf_elastic import ElasticConfig

DIFFERENT = "tensors that differ between nested, stock and re-assembled checkpoints"
BYTES = "bytes of the nested files / bytes of the stock files"
TIMES = {
    "layout": "nested / stock layout, both in this package, the whole parent, {} files: time until {}",
    "stock": "nested / stock checkpoint in transformers, the whole parent, {} files: time until {}",
}
"""By what the nested layout is compared with."""
PEAK = "peak anonymous memory of loading the 12B size of the nested layout / bytes of its weights"
CLAIMS = [
    Claim(DIFFERENT, 0, "=="),
    Claim(BYTES, 1.01),
    *(Claim(label.format(cache, "read"), 1.2) for label in TIMES.values() for cache in ("cold", "warm")),
    Claim(PEAK, 1.1),
]
SMALLEST = "12b"

transformers.logging.set_verbosity_error()  # also in the child processes, which import this module
transformers.logging.disable_progress_bar()


def main() -> int:
    options = arguments(__doc__).parse_args()
    parent, budgets = published_family(torch.bfloat16, **({"scale": 8, "experts": 16} if options.quick else {}))
    report = Report("nested_layout", CLAIMS)
    with tempfile.TemporaryDirectory(prefix="hf-elastic-nested-") as scratch:
        folders = {name: Path(scratch, name) for name in ("stock", "layout", "nested", "reassembled")}
        in_child(_prepare, folders, parent, budgets)
        compare(report, folders, budgets)
        shutil.rmtree(folders["reassembled"])  # else the page cache has no room for the others
        whole = sum(file.stat().st_size for file in folders["layout"].glob("*.safetensors"))
        with backed_memory(whole * 5 // 2):  # for what is loaded, and for files that are read anew
            time(report, folders, 2 if options.quick else 15)
    return report.finish(options)


def compare(report: Report, folders: dict[str, Path], budgets: Iterable[str]) -> None:
    """Sizes of the files, and every tensor of every size."""
    layouts = ("layout", "nested", "reassembled")
    sizes = {name: sum(file.stat().st_size for file in folders[name].rglob("*.safetensors")) for name in layouts}
    for name, size in sizes.items():
        report.measure(f"bytes of the {name} files", "bytes", [size])
    report.settle(BYTES, sizes["nested"] / sizes["layout"])
    for budget, files in ElasticConfig.from_pretrained(folders["nested"]).elastic["files"].items():
        report.measure(f"bytes of the files of {budget}", "bytes", [sum(files.values())])
    differences = [
        in_child(_differences, folders[name], folders["layout"], budget).result
        for name, compared in (("nested", (None, *budgets)), ("reassembled", (None,)))
        for budget in compared
    ]
    report.settle(DIFFERENT, sum(differences))


def time(report: Report, folders: dict[str, Path], rounds: int) -> None:
    """Measure the three ways in turns, cold and warm."""
    for cache in ("cold", "warm"):
        ways = ("stock", "layout", "nested")
        actions = {name: partial(_run, folders[name], None, cache == "cold") for name in ways}
        if cache == "warm":
            in_turns(actions, 1)  # fills the page cache
        medians = report_times(report, in_turns(actions, rounds), cache, "way")
        for other, label in TIMES.items():
            ratios = {moment: medians["nested", moment] / medians[other, moment] for moment in ("returned", "read")}
            for moment, ratio in ratios.items():
                report.measure(label.format(cache, moment), "", [ratio], cache=cache)
            report.settle(label.format(cache, "read"), ratios["read"])
    smallest = ElasticConfig.from_pretrained(folders["layout"]).costs()[SMALLEST].weight_bytes(torch.bfloat16)
    peaks = [_run(folders["nested"], SMALLEST, False).peak_anonymous_bytes / smallest for _ in range(rounds)]
    report.settle(PEAK, report.measure(PEAK, "", peaks))


def _run(folder: Path, budget: str | None, cold: bool) -> ChildRun:
    files = sorted(folder.rglob("*.safetensors"))
    return in_child(_load, folder, budget, before=partial(drop_page_cache, files) if cold else None)


# -- in processes of their own -----------------------------------------------------------------------------------------


def _prepare(
    folders: dict[str, Path], parent: transformers.NemotronHConfig, budgets: dict[str, dict[str, int]]
) -> None:
    folders["layout"].mkdir()
    write_checkpoint(folders["layout"], parent, budgets)
    write_stock(folders["stock"], parent, folders["layout"])
    AutoModelForCausalLM.from_pretrained(folders["layout"]).save_pretrained(folders["nested"], layout="nested")
    AutoModelForCausalLM.from_pretrained(folders["nested"]).save_pretrained(folders["reassembled"])


def _differences(left: Path, right: Path, budget: str | None) -> int:
    mine, theirs = (AutoModelForCausalLM.from_pretrained(f, budget=budget).state_dict() for f in (left, right))
    names = mine.keys() | theirs.keys()
    return sum(name not in mine or name not in theirs or not torch.equal(mine[name], theirs[name]) for name in names)


def _load(folder: Path, budget: str | None) -> dict[str, Any]:
    size = {} if budget is None else {"budget": budget}
    return timed(lambda: AutoModelForCausalLM.from_pretrained(folder, **size))


if __name__ == "__main__":
    sys.exit(main())
