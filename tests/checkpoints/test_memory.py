"""The largest size that fits: into what is free where a model is loaded, and as a question before anything is fetched."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from cases import BUDGETS
from transformers import AutoModelForCausalLM

from hf_elastic import ElasticConfig, ElasticConfigError, UnknownBudgetError
from hf_elastic.architectures.cost import CostModel
from hf_elastic.checkpoints import memory
from hf_elastic.cli import main

load = AutoModelForCausalLM.from_pretrained


def needs(config: ElasticConfig, dtype: torch.dtype, tokens: int, sequences: int = 1) -> dict[str, int]:
    """Bytes per budget; `test_table.py` compares the counts with tensors."""
    return {
        name: cost.weight_bytes(dtype) + cost.cache_bytes(tokens, sequences, dtype)
        for name, cost in config.costs().items()
    }


@pytest.fixture
def free(monkeypatch):
    """A machine with so many free bytes per device."""

    def set_free(sizes):
        real = memory.get_max_memory
        monkeypatch.setattr(memory, "get_max_memory", lambda given=None: real(given) if given else dict(sizes))

    return set_free


def test_auto_is_the_largest_with_its_caches_in_nine_tenths_of_what_is_free(family_folder, free, caplog):
    """By `max_position_embeddings`, 128 here, where nothing else is said."""
    folder = family_folder("nano3")
    measured = needs(ElasticConfig.from_pretrained(folder), torch.bfloat16, 128)
    for name, size in measured.items():
        for bytes_free, fits in ((size / 0.9 + 2, True), (size / 0.9 - 2, False)):
            free({"cpu": int(bytes_free)})
            if not fits and name == "small":
                with pytest.raises(UnknownBudgetError, match=r"90% of .* of main memory.*no submodel.*'small', needs"):
                    load(folder, budget="auto", dtype="bfloat16")
                continue
            with caplog.at_level(logging.INFO, "hf_elastic.checkpoints.memory"):
                model = load(folder, budget="auto", dtype="bfloat16")
            assert (model.budget == name) == fits
    assert "1 x 128 tokens, which is 90% of" in caplog.text
    assert "chose medium, which needs" in caplog.text


def test_auto_counts_the_caches_that_are_asked_for(family_folder, free):
    folder = family_folder("granite")
    measured = needs(ElasticConfig.from_pretrained(folder), torch.float32, 64, 4)
    free({"cpu": int(measured["medium"] / 0.9 + 2)})
    asked = {"memory": "auto", "context_length": 64, "batch_size": 4}
    assert load(folder, budget=asked).budget == "medium"
    assert load(folder, budget={**asked, "batch_size": 5}).budget == "small"
    assert load(folder, budget={**asked, "batch_size": 3}).budget == "medium"


@pytest.mark.parametrize(
    ("sizes", "device_map", "max_memory", "expected"),
    [
        ({"cpu": 50}, None, None, (50, "main memory")),
        ({0: 70, "cpu": 50}, None, None, (50, "main memory")),
        ({0: 30, "cpu": 50}, None, None, (30, "device 0")),
        ({0: 30, 1: 40, "cpu": 50}, 1, None, (40, "device 1")),
        ({0: 30, 1: 40, "cpu": 50}, "cuda:1", None, (40, "device 1")),
        ({0: 30, 1: 40, "cpu": 50}, torch.device("cuda"), None, (30, "device 0")),
        ({0: 30, 1: 40, "cpu": 50}, {"": "cpu"}, None, (50, "main memory")),
        ({0: 30, 1: 40, "cpu": 50}, "auto", None, (70, "device 0 and device 1")),
        ({"cpu": 50}, "auto", None, (50, "main memory")),
        ({"cpu": 50}, "auto", {"cpu": "20KB", "disk": "1GB"}, (20_000, "main memory")),
        ({"mps": 50}, "mps", None, (50, "device mps")),
    ],
)
def test_whose_memory_is_meant(sizes, device_map, max_memory, expected, free):
    free(sizes)
    assert memory.free_memory(device_map, max_memory) == expected


def test_what_auto_cannot_tell(family_folder, free):
    free({"cpu": 10**9})
    folder = family_folder("nano3")
    with pytest.raises(ElasticConfigError, match=r"places parts by hand \(2 places\); give one device"):
        load(folder, budget="auto", device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(ElasticConfigError, match="nothing is known of the memory of device_map='cuda:3'"):
        load(folder, budget="auto", device_map="cuda:3")
    family = load(folder)
    for budget in ("auto", {"memory": "auto"}):
        with pytest.raises(ElasticConfigError, match="only from_pretrained takes it; give an amount"):
            family.set_budget(budget)
    named = ElasticConfig.from_parent(family.config, {"auto": BUDGETS["nano3"]["large"]})
    assert load(folder, config=named, budget="auto").budget == "auto"


def run_json(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_says_what_fits_before_any_weights_are_there(family_folder, tmp_path, capsys, free):
    (tmp_path / "config.json").write_bytes((family_folder("nano3") / "config.json").read_bytes())
    measured = needs(ElasticConfig.from_pretrained(tmp_path), torch.bfloat16, 32, 2)
    options = ["plan", tmp_path, "--context", 32, "--batch-size", 2, "--dtype", "bf16"]
    found = run_json(capsys, *options, "--fits", f"{measured['medium'] / 1000}kB", "--json")["fits"]
    assert (found["needs"], found["budget"], found["between"]) == (measured, "medium", None)
    assert found["dtype"] == "bfloat16"
    found = run_json(capsys, *options, "--fits", f"{(measured['small'] - 1) / 1000}kB", "--json")["fits"]
    assert (found["budget"], found["between"]) == (None, None)
    assert main([*map(str, options), "--fits", "20kB"]) == 0
    assert (
        "nothing fits into 20.00 kB with the caches of 2 x 32 tokens in bfloat16: the smallest, small,"
        in capsys.readouterr().out
    )
    free({"cpu": int(measured["large"] / 0.9 + 2)})
    assert main([*map(str, options), "--fits", "auto"]) == 0
    assert "in bfloat16: large, which needs" in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--context", "9"]) == 2
    assert "give --fits too" in capsys.readouterr().err


def test_plan_tells_sizes_between_budgets_from_budgets(original, tmp_path, capsys):
    """What a router found between two budgets is selected by a limit, but has no name to load it by."""
    config = ElasticConfig.from_parent(original("nano3").config, BUDGETS["nano3"])
    between = config.architecture.submodel(config.parent_config, {"mamba_heads": 10, "expert_ffn": 12})
    axes = {**config.axes, "mamba_heads": {**config.axes["mamba_heads"], "choices": [12, 10, 8, 6]}}
    section = {"axes": axes, "budgets": config.budgets, "interpolated": [{"sizes": between.to_dict()}]}
    config = ElasticConfig(parent_config=config.parent_config, elastic=section)
    config.save_pretrained(tmp_path)
    count = CostModel(config.parent_config)
    size = count(between).weight_bytes(torch.float32)
    assert main(["plan", str(tmp_path), "--fits", f"{size / 1000}kB"]) == 0
    out = capsys.readouterr().out
    assert "in float32: large, which needs" in out
    assert "a size between two budgets, " in out
    found = run_json(capsys, "plan", tmp_path, "--fits", f"{size / 1000}kB", "--json")["fits"]
    assert found["budget"] == "large"
    assert found["between"] == {"total_params": count(between).total_params, "needs": size}
