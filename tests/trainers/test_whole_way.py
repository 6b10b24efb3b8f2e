"""Every table, the whole way: counted, made elastic, trained, saved in both layouts, loaded at every size, exported, and read by a process without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_logits, logits
from datasets import Dataset
from runs import trainer
from transformers import CONFIG_MAPPING, PreTrainedConfig

from hf_elastic import ElasticForCausalLM, elastify
from hf_elastic.architectures import ARCHITECTURES, Architecture
from hf_elastic.architectures.submodel import LAYERS
from hf_elastic.commands.plan import plan
from hf_elastic.errors import ElasticConfigError
from hf_elastic.testing.cases import cases_of
from hf_elastic.testing.models import VOCAB, random_model, tiny_config

ADDED: dict[str, dict[str, Any]] = {"lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16}}
"""What the stock config class cannot do without, although it has a default for everything."""

READER = """
import json, sys
sys.modules["hf_elastic"] = None  # as if it were not installed
import torch, transformers
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
for line in sys.stdin:
    asked = json.loads(line)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(asked["folder"], output_loading_info=True)
    with torch.no_grad():
        torch.save(model(input_ids=torch.tensor(asked["ids"]), use_cache=False).logits, asked["to"])
    told = {"class": type(model).__name__, "wrong": [name for name, what in info.items() if what]}
    print(json.dumps({**told, "parameters": model.num_parameters()}), flush=True)
"""

Read = Callable[[Path, torch.Tensor], tuple[torch.Tensor, dict[str, Any]]]


@pytest.fixture(scope="module")
def read_elsewhere() -> Iterator[Read]:
    """Another process that reads exports as long as there are some, as its start takes longer than all it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def read(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        asked = {"folder": str(folder), "ids": ids.tolist(), "to": str(folder / "logits.pt")}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        told = process.stdout.readline()
        assert told, "the process that reads exports has ended"
        return torch.load(folder / "logits.pt"), json.loads(told)

    yield read
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_plan_counts_the_stock_model(model_type, tmp_path):
    """Of the sizes that the stock config class has by default, which are those of a published model."""
    config = CONFIG_MAPPING[model_type](**ADDED.get(model_type, {}))
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        stock = ARCHITECTURES[model_type].causal_class(config)
    whole = plan(str(tmp_path))[0]
    assert whole["total_params"] == stock.num_parameters()
    assert whole["weight_bytes"]["float32"] == 4 * sum(
        tensor.numel()
        for name, tensor in stock.state_dict(keep_vars=True).items()
        if name not in stock.all_tied_weights_keys
    )


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_from_a_stock_model_to_a_process_without_this_package(model_type, tmp_path, read_elsewhere):
    parent = random_model(tiny_config(model_type))
    table, generator = ARCHITECTURES[model_type], torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(2, VOCAB, (12,), generator=generator).tolist()} for _ in range(4)]
    budgets = nested_budgets(table, parent.config)
    family = elastify(parent, rows, budgets=budgets, batch_size=4, progress=False)
    before = {name: tensor.clone() for name, tensor in family.named_parameters()}
    with torch.enable_grad():
        trainer(tmp_path / "run", family, dataset=Dataset.from_list(rows), max_steps=3).train()
    moved = [name for name, tensor in family.named_parameters() if not torch.equal(tensor, before[name])]
    assert len(moved) > 0.9 * len(before)

    ids = torch.randint(2, VOCAB, (2, 11), generator=generator)
    family.eval()
    expected = {}
    for budget in ("full", *budgets):
        with family.at(budget):
            expected[budget] = logits(family, ids)
    assert all((expected["full"] - expected[budget]).abs().max() > 0.1 for budget in budgets)
    for layout in ("stock", "nested"):
        family.save_pretrained(tmp_path / layout, layout=layout)
        for budget, wanted in expected.items():
            loaded = ElasticForCausalLM.from_pretrained(tmp_path / layout, budget=budget)
            assert_same_logits(logits(loaded, ids), wanted)
    for budget, wanted in expected.items():
        folder = tmp_path / f"exported {budget}"
        family.export(folder, budget=budget)
        theirs, told = read_elsewhere(folder, ids)
        assert told["class"] == table.causal_class.__name__
        assert not told["wrong"]
        assert_same_logits(theirs, wanted)
        counted = {entry["name"]: entry["total_params"] for entry in plan(str(tmp_path / "nested"))}
        assert told["parameters"] == counted[budget]


def nested_budgets(table: Architecture, config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """A size that is smaller in everything, and one in between that keeps all layers and one axis whole."""
    small = cases_of(table, config).named("all axes")[-1].sizes
    for kept in small:
        middle = {axis: size for axis, size in small.items() if axis not in (kept, LAYERS)}
        try:
            table.submodel(config, middle)
        except ElasticConfigError:
            continue
        return {"middle": middle, "small": small}
    raise AssertionError(f"no size of {table.model_type} lies between {small} and the whole")
