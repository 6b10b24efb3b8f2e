"""Loading one size of an elastic checkpoint: as fast and as lean as loading a checkpoint of that size.

A random `nemotron_h` MoE parent in the proportions of Nemotron Nano v3 (bfloat16, more than 2 GB, one tensor per expert) nests a
budget of half its bytes, which cuts `hidden` and `expert_ffn`. Three ways to that model, each run in a process of its own, in turns:

- `slice`: `AutoModelForCausalLM.from_pretrained(parent, budget="half")`;
- `export`: `AutoModelForCausalLM.from_pretrained(exported)`, the stock class on the stock checkpoint of the same weights;
- `cut`: the whole parent by the stock class, then `slice_state_dict` in memory (no model is built from it, in its favour).

Two times are taken, because transformers maps tensors that need no conversion and has not read them when it returns: `returned`,
when `from_pretrained` is back, and `read`, when a value on every page of every weight has been read as well. `cold` runs start with
the files out of the page cache, `warm` ones with the files in it. Memory is the highest anonymous memory up to `read`.

Claims: slice / export at most 1.3 in both times, cold and warm; peak at most 1.1 times the bytes of the slice's weights.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from harness import Claim, Report, arguments, in_turns
from processes import ChildRun, backed_memory, drop_page_cache, in_child
from synthetic import half_budget, nano_like, write_checkpoint, write_stock
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_elastic import ElasticConfig
from hf_elastic.architectures.cost import CostModel
from hf_elastic.submodels.slicing import slice_state_dict

TIME = "slice / export, {} files: time until {}"
PEAK = "peak anonymous memory of loading the slice / bytes of its weights"
CLAIMS = [
    *(Claim(TIME.format(cache, moment), 1.3) for cache in ("cold", "warm") for moment in ("returned", "read")),
    Claim(PEAK, 1.1),
]

transformers.logging.set_verbosity_error()  # also in the child processes, which import this module
transformers.logging.disable_progress_bar()


def main() -> int:
    options = arguments(__doc__).parse_args()
    parent = nano_like(torch.bfloat16, scale=8, experts=16) if options.quick else nano_like(torch.bfloat16)
    rounds = 2 if options.quick else 9
    report = Report("loading", CLAIMS)
    with tempfile.TemporaryDirectory(prefix="hf-elastic-loading-") as scratch:
        folders = {name: Path(scratch, name) for name in ("elastic", "export", "stock_parent")}
        in_child(_prepare, folders, parent)  # a process of its own gives all its memory back
        held = 3 * CostModel(parent).full.weight_bytes(torch.bfloat16)  # for models, and for files that are read anew
        with backed_memory(held):
            compare(report, folders, rounds)
    return report.finish(options)


def compare(report: Report, folders: dict[str, Path], rounds: int) -> None:
    """Measure the three ways in turns, cold and warm, and settle the claims."""
    config = ElasticConfig.from_pretrained(folders["elastic"])
    half, whole = config.costs()["half"], CostModel(config.parent_config).full
    slice_bytes = half.weight_bytes(torch.bfloat16)
    report.measure("bytes of the parent's weights", "bytes", [whole.weight_bytes(torch.bfloat16)])
    report.measure("bytes of the slice's weights", "bytes", [slice_bytes])
    ways: dict[str, tuple[Any, Path]] = {
        "slice": (_load_slice, folders["elastic"]),
        "export": (_load_stock, folders["export"]),
        "cut": (_load_and_cut, folders["stock_parent"]),
    }
    peaks: list[float] = []
    for cache in ("cold", "warm"):
        actions = {way: partial(_run, action, folder, cache == "cold") for way, (action, folder) in ways.items()}
        if cache == "warm":
            in_turns(actions, 1)  # fills the page cache
        runs = in_turns(actions, rounds)
        medians = report_times(report, runs, cache, "way")
        for way, results in runs.items():
            relative = [run.peak_anonymous_bytes / slice_bytes for run in results]
            report.measure(f"{way}, {cache} files: peak anonymous memory / slice", "", relative, way=way, cache=cache)
            if cache == "cold":
                disk = [run.result["disk_bytes"] / slice_bytes for run in results]
                report.measure(f"{way}, {cache} files: bytes read from disk / slice", "", disk, way=way, cache=cache)
        for moment in ("returned", "read"):
            report.settle(TIME.format(cache, moment), medians["slice", moment] / medians["export", moment])
        ratio = medians["cut", "read"] / medians["slice", "read"]
        report.measure(f"cut / slice, {cache} files: time until read", "", [ratio], cache=cache)
        peaks.extend(run.peak_anonymous_bytes / slice_bytes for run in runs["slice"])
    report.settle(PEAK, max(peaks))


def report_times(
    report: Report, runs: Mapping[str, list[ChildRun]], cache: str, what: str
) -> dict[tuple[str, str], float]:
    """Record the times of runs that [`timed`] took; returns the medians by name and moment. `what` is what the names are."""
    medians = {}
    for name, results in runs.items():
        for moment in results[0].result["seconds"]:
            seconds = [run.result["seconds"][moment] for run in results]
            label = f"{name}, {cache} files: time until {moment}"
            about = {what: name, "cache": cache, "moment": moment}
            medians[name, moment] = report.measure(label, "s", seconds, **about)
    return medians


def _run(action: Any, folder: Path, cold: bool) -> ChildRun:
    files = sorted(folder.glob("*.safetensors"))
    return in_child(action, folder, before=partial(drop_page_cache, files) if cold else None)


# -- in processes of their own -----------------------------------------------------------------------------------------


def _prepare(folders: dict[str, Path], parent: transformers.NemotronHConfig) -> None:
    folders["elastic"].mkdir()
    write_checkpoint(folders["elastic"], parent, {"half": half_budget(parent)})
    write_stock(folders["stock_parent"], parent, folders["elastic"])
    AutoModelForCausalLM.from_pretrained(folders["elastic"], budget="half").export(folders["export"])


def _load_slice(folder: Path) -> dict[str, Any]:
    return timed(lambda: AutoModelForCausalLM.from_pretrained(folder, budget="half"))


def _load_stock(folder: Path) -> dict[str, Any]:
    return timed(lambda: AutoModelForCausalLM.from_pretrained(folder))


def _load_and_cut(folder: Path) -> dict[str, Any]:
    def cut() -> dict[str, torch.Tensor]:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
        config = ElasticConfig.from_parent(model.config, {"half": half_budget(model.config)})
        return slice_state_dict(config.architecture, model.config, model.state_dict(), config.submodel("half"))

    return timed(cut)


def timed(load: Any) -> dict[str, Any]:
    """Seconds until a loader returned and until every page was read, and bytes read from the disk."""
    read_before = _disk_bytes()
    start = perf_counter()
    loaded = load()
    returned = perf_counter() - start
    tensors = loaded.values() if isinstance(loaded, dict) else [*loaded.parameters(), *loaded.buffers()]
    for tensor in tensors:
        step = os.sysconf("SC_PAGE_SIZE") // tensor.element_size()
        tensor.detach().view(-1)[::step].count_nonzero()
    read = perf_counter() - start
    return {"seconds": {"returned": returned, "read": read}, "disk_bytes": _disk_bytes() - read_before}


def _disk_bytes() -> int:
    """Bytes that this process made the kernel fetch from storage."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(fields["read_bytes"])


if __name__ == "__main__":
    sys.exit(main())
