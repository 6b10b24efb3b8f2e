"""What the pages say of published models is what is counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from published import NANO3_4B, PARENTS, first_layers_of

from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.cost import Cost, CostModel

DOCS = Path(__file__).parents[2] / "docs"
ROW = re.compile(r"^\| ([\w. -]+) \| `(--budget .*?)` \| ([\d.B(), ]+) \|", re.MULTILINE)
ROWS = [row for page in ("architectures.md", "make.md") for row in ROW.findall((DOCS / page).read_text("utf-8"))]


def told(cost: Cost) -> str:
    active = f" ({cost.active_params / 1e9:.2f}B)" if cost.active_params != cost.total_params else ""
    return f"{cost.total_params / 1e9:.2f}B{active}"


@pytest.mark.parametrize(("model", "options", "counts"), ROWS, ids=[f"{row[0]} {row[1][9:]}" for row in ROWS])
def test_sizes_have_the_counts_that_the_pages_say(model, options, counts):
    config = PARENTS[model]()
    architecture, count = get_architecture(config.model_type), CostModel(config)
    costs = [count.full]
    for sizes in re.findall(r"--budget \w+:(\S+)", options):
        spec = {axis: int(size) for axis, size in re.findall(r"(\w+)=(\d+)", sizes)}
        if "layers" in spec:  # of the published model
            spec["layers"] = first_layers_of(config.hybrid_override_pattern, NANO3_4B)
        costs.append(count(architecture.submodel(config, spec)))
    assert counts == ", ".join(map(told, costs))


def test_every_published_parent_has_a_row():
    assert {row[0] for row in ROWS} == set(PARENTS)
