"""Pulling one size from the Hub: only its bytes travel, and each of them once.

A random `nemotron_h` MoE parent in the proportions of Nemotron Nano v3 (bfloat16) nests a budget of half its bytes. It lies on a server on
this machine that speaks the Hub's HTTP (`local_hub.py`), in the nested layout, in the stock layout, and in the stock layout with checksums of
blocks (`checked`), as `save_pretrained` writes them; the real `huggingface_hub` client fetches from it, in processes of their own with `HF_ENDPOINT` and a cache of their own. The server counts the bytes of all bodies that
it sends, configurations included.

- `half`: the half budget into an empty cache; `whole`: the whole parent after it; `again`: the half budget once more, offline.
- `cut`: the half budget into another empty cache, while the server cuts the connection several times.
- `given up`: the stock layout with checksums while the connection breaks for good, and the same load again when it is back.

Claims: half / bytes of the slice's weights at most 1.02 in the nested layout; whole / bytes of what is missing at most 1.02; nothing is sent for
`again`; cut / half at most 1.02; given up / half at most 1.05, as files that are fetched whole, because a budget needs most of them, start anew; half with checksums / half
without at most 1.05, the file of checksums included.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import Claim, Report, arguments
from local_hub import LocalHub
from processes import in_child
from synthetic import half_budget, nano_like, write_checkpoint
from transformers import AutoModelForCausalLM

from hf_elastic import ElasticConfig
from hf_elastic.architectures.cost import CostModel
from hf_elastic.storage.checksums import write_checksums

HALF = "bytes sent for the half budget, nested layout / bytes of its weights"
WHOLE = "bytes sent for the whole parent after it / bytes of the weights that are missing"
AGAIN = "bytes sent for the half budget once more, offline"
CUT = "bytes sent for the half budget with connections cut / without, nested layout"
GIVEN_UP = "bytes sent for the half budget in two attempts / in one, stock layout with checksums"
CHECKED = "bytes sent for the half budget with checksums / without, stock layout"
CLAIMS = [
    Claim(HALF, 1.02),
    Claim(WHOLE, 1.02),
    Claim(AGAIN, 0, "=="),
    Claim(CUT, 1.02),
    Claim(GIVEN_UP, 1.05),
    Claim(CHECKED, 1.05),
]
CLIENT_CHUNK = 10 << 20  # what the client has not received in chunks of this size it asks for again
REPOSITORY = "org/{}"

transformers.logging.set_verbosity_error()  # also in the child processes, which import this module
transformers.logging.disable_progress_bar()


def main() -> int:
    options = arguments(__doc__).parse_args()
    quick: dict[str, Any] = {"experts": 16, "layers": "MEM*E"} if options.quick else {}
    parent = nano_like(torch.bfloat16, scale=4, **quick)  # rows have to be worth a request of their own
    report = Report("hub_fetch", CLAIMS)
    with tempfile.TemporaryDirectory(prefix="hf-elastic-hub-") as scratch, LocalHub() as hub:
        os.environ |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(Path(scratch, "home")),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        os.environ.pop("HF_HUB_OFFLINE", None)
        folders = {layout: Path(scratch, layout) for layout in ("stock", "checked", "nested")}
        in_child(_prepare, folders, parent)
        for layout, folder in folders.items():
            hub.commit(REPOSITORY.format(layout), folder)
        measure(report, hub, folders, Path(scratch))
    return report.finish(options)


def measure(report: Report, hub: LocalHub, folders: dict[str, Path], scratch: Path) -> None:
    config = ElasticConfig.from_pretrained(folders["stock"])
    slice_bytes = config.costs()["half"].weight_bytes(torch.bfloat16)
    whole_bytes = CostModel(config.parent_config).full.weight_bytes(torch.bfloat16)
    report.measure("bytes of the parent's weights", "bytes", [whole_bytes])
    report.measure("bytes of the slice's weights", "bytes", [slice_bytes])

    def pull(layout: str, budget: str | None, cache: Path, **how: Any) -> int:
        hub.reset()
        in_child(_pull, REPOSITORY.format(layout), budget, cache, how)
        return hub.sent.total()

    sent: dict[str, int] = {}
    for layout in folders:
        cache = scratch / f"cache-{layout}"
        sent[layout] = pull(layout, "half", cache)
        report.measure(f"{layout} layout: half / slice", "", [sent[layout] / slice_bytes], layout=layout)
        report.measure(
            f"{layout} layout: half / the whole repository", "", [sent[layout] / _size(folders[layout])], layout=layout
        )
        again = pull(layout, "half", cache, local_files_only=True)
        whole = pull(layout, None, cache)
        report.measure(
            f"{layout} layout: whole after half / missing", "", [whole / (whole_bytes - slice_bytes)], layout=layout
        )
        if layout == "nested":
            report.settle(HALF, sent[layout] / slice_bytes)
            report.settle(AGAIN, again)
            report.settle(WHOLE, whole / (whole_bytes - slice_bytes))
        shutil.rmtree(cache)
    file = next(file for file in ElasticConfig.from_pretrained(folders["nested"]).elastic["files"]["half"])
    hub.cuts[file] = [CLIENT_CHUNK + 1000, 2 * CLIENT_CHUNK + 1000, 1000]
    report.settle(CUT, pull("nested", "half", scratch / "cache-cut") / sent["nested"])
    report.settle(CHECKED, sent["checked"] / sent["stock"])
    hub.limit = sent["checked"] // 2
    try:
        pull("checked", "half", scratch / "cache-given-up")
    except RuntimeError as error:  # what went wrong in the process
        if "hf_elastic.errors." not in str(error):
            raise
    else:
        raise RuntimeError("the connection did not break")
    first, hub.limit = hub.sent.total(), None
    second = pull("checked", "half", scratch / "cache-given-up")
    report.measure("checked layout: sent before the connection broke for good / half", "", [first / sent["checked"]])
    report.settle(GIVEN_UP, (first + second) / sent["checked"])


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# -- in processes of their own -----------------------------------------------------------------------------------------


def _prepare(folders: dict[str, Path], parent: transformers.NemotronHConfig) -> None:
    folders["stock"].mkdir()
    write_checkpoint(folders["stock"], parent, {"half": half_budget(parent)})
    shutil.copytree(folders["stock"], folders["checked"], copy_function=os.link)
    write_checksums(folders["checked"])
    AutoModelForCausalLM.from_pretrained(folders["stock"]).save_pretrained(folders["nested"], layout="nested")


def _pull(repository: str, budget: str | None, cache: Path, how: dict[str, Any]) -> None:
    AutoModelForCausalLM.from_pretrained(repository, budget=budget, cache_dir=cache, **how)


if __name__ == "__main__":
    sys.exit(main())
