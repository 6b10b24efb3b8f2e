"""Bytes of quantised families, counted from a config: against files, loaded models and the published sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from coded import family, file_bytes, write_family
from nano_v3 import nano_v3
from transformers import AutoConfig

from hf_elastic import ElasticConfig, ElasticConfigError, ElasticForCausalLM, UnknownBudgetError
from hf_elastic.checkpoints.checkpoint import Checkpoint
from hf_elastic.checkpoints.downloads import download_bytes
from hf_elastic.checkpoints.exporting import export_checkpoint
from hf_elastic.checkpoints.nested import levels_for, write_nested
from hf_elastic.cli import main
from hf_elastic.commands.plan import fits, plan
from hf_elastic.configuration.budgets import format_bytes
from hf_elastic.configuration.known import KNOWN
from hf_elastic.hub.cards import render_card
from hf_elastic.hub.publishing import prepare_upload
from hf_elastic.quantization.recipes import quantized_config

GIB = 2**30
SIZES = ["full", "half", "small"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Quantised families in the stock layout, by name and recipe; not to be changed."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, recipe: str = "nvfp4") -> Path:
        if (name, recipe) not in made:
            made[name, recipe] = tmp_path_factory.mktemp(f"{name}-{recipe}")
            write_family(made[name, recipe], name, recipe)
        return made[name, recipe]

    return get


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("nemotron", "nvfp4"),
        ("granite", "fp8"),
        pytest.param("nemotron", "fp8", marks=pytest.mark.slow),
        pytest.param("granite", "nvfp4", marks=pytest.mark.slow),
    ],
)
def test_bytes_are_those_of_the_files_and_of_the_models(name, recipe, folders, tmp_path):
    folder = folders(name, recipe)
    elastic = ElasticConfig.from_pretrained(folder)
    costs, dtype = elastic.costs(), torch.bfloat16
    whole = Checkpoint([folder / "model.safetensors"], elastic.encodings)
    assert costs["full"].stored_bytes(dtype) == file_bytes(folder)
    files = write_nested(tmp_path, whole, elastic)
    stored = 0
    for size in reversed(SIZES):
        stored += file_bytes(tmp_path / "budgets" / size)
        cost, member = costs[size], elastic.submodel(size)
        assert cost.stored_bytes(dtype) == stored < cost.weight_bytes(dtype)
        model = ElasticForCausalLM.from_pretrained(folder, budget=size)
        assert cost.weight_bytes(dtype) == sum(tensor.nbytes for tensor in model.state_dict().values())
        coded = whole.coded_slice(elastic.architecture, elastic.parent_config, member)
        assert stored == sum(part[...].nbytes for part in coded.values())
        extents = whole.extents(elastic.architecture, elastic.parent_config, member)
        assert download_bytes(elastic, member) == sum(
            stop - start for runs in extents.values() for start, stop in runs
        )
    nested = ElasticConfig(
        parent_config=elastic.parent_config,
        elastic={**{key: value for key, value in elastic.elastic.items() if key != "version"}, "files": files},
    )
    for size in SIZES:
        levels = levels_for(nested, nested.submodel(size))
        there = sum(
            file.stat().st_size for level in levels for file in (tmp_path / "budgets" / level).glob("*.safetensors")
        )
        assert download_bytes(nested, nested.submodel(size)) == there


@pytest.mark.parametrize(("recipe", "most"), [("nvfp4", (18.1, 13.6, 7.6)), ("fp8", (30.2, 22.7, 12.2))])
def test_the_published_widths(recipe, most):
    (known,) = KNOWN.values()
    config = nano_v3()
    config.dtype = torch.bfloat16
    plain = ElasticConfig.from_parent(config, known.budgets)
    costs = quantized_config(plain, recipe).costs()
    for (name, cost), limit in zip(costs.items(), most, strict=True):
        assert 0.97 * limit < cost.stored_bytes(torch.bfloat16) / GIB <= limit
        assert cost.weight_bytes(torch.bfloat16) == plain.costs()[name].weight_bytes(torch.bfloat16)
        assert plain.costs()[name].stored_bytes(torch.bfloat16) == cost.weight_bytes(torch.bfloat16)


def _computed(model) -> int:
    """Bytes of buffers that are not saved."""
    return sum(
        buffer.nbytes
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and "codes" not in name and "scale" not in name
    )


def test_memory_is_what_will_be_held(folders):
    elastic = ElasticConfig.from_pretrained(folders("nemotron"))
    costs = elastic.costs()
    decoded = {name: cost.weight_bytes(torch.bfloat16) for name, cost in costs.items()}
    stored = {name: cost.stored_bytes(torch.bfloat16) for name, cost in costs.items()}
    assert stored["full"] > decoded["half"] > stored["half"]
    room = {"memory": stored["full"]}
    assert elastic.name_of(elastic.resolve(room)) == "half"
    assert elastic.name_of(elastic.resolve(room, packed=True)) == "full"
    assert elastic.name_of(elastic.resolve({"memory": stored["full"] - 1}, packed=True)) == "half"
    assert elastic.name_of(elastic.resolve({"memory": decoded["half"] - 1})) == "small"
    assert elastic.name_of(elastic.resolve(room, torch.float32)) == "small", "decoded in float32"
    with pytest.raises(UnknownBudgetError, match=r"'small', needs 72\.04 kB"):
        elastic.resolve({"memory": stored["small"]})
    model = ElasticForCausalLM.from_pretrained(folders("nemotron"), budget=room)
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) == decoded["half"]
    packed = ElasticForCausalLM.from_pretrained(folders("nemotron"), budget=room, packed=True)
    assert sum(tensor.nbytes for tensor in (*packed.parameters(), *packed.buffers())) == stored["full"] + _computed(
        packed
    )
    with packed.at({"memory": stored["full"] - 1}):
        assert packed.budget == "half", "of what is held, not of what is decoded"
    caches = {"context_length": 16, "batch_size": 2}
    found = fits(elastic, {**room, **caches}, packed=True)
    kept = {name: cost.cache_bytes(16, 2) for name, cost in costs.items()}
    assert found["needs"] == {name: stored[name] + kept[name] for name in stored}
    assert (found["budget"], fits(elastic, room)["needs"], fits(elastic, room)["budget"]) == ("half", decoded, "half")


def test_the_plan_says_what_is_stored_and_what_is_held(folders, capsys):
    folder = folders("nemotron")
    elastic = ElasticConfig.from_pretrained(folder)
    costs = elastic.costs()
    for entry in plan(str(folder)):
        cost = costs[entry["name"]]
        assert entry["formats"] == ["nvfp4"]
        assert entry["stored_bytes"] == cost.stored_bytes(torch.bfloat16)
        assert entry["weight_bytes"]["bfloat16"] == cost.weight_bytes(torch.bfloat16)
        assert entry["download_bytes"] == download_bytes(elastic, elastic.submodel(entry["name"]))
    room = str(costs["full"].stored_bytes(torch.bfloat16) / 1000) + "kB"
    assert main(["plan", str(folder), "--fits", room, "--packed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]["budget"] == "full"
    assert main(["plan", str(folder), "--fits", room]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:6] == ["budget", "params", "active", "stored", "download", "bf16"]
    half = next(line for line in lines if line.startswith("half"))
    assert format_bytes(costs["half"].stored_bytes(torch.bfloat16)) in half
    assert any(line.startswith("stored in nvfp4;") for line in lines)
    assert lines[-1].startswith(f"largest in {format_bytes(249424)} in bfloat16: half,")
    assert main(["plan", str(folder), "--packed"]) == 2
    assert "--packed says how weights are held" in capsys.readouterr().err


def test_packed_memory_is_refused_where_nothing_is_stored_in_few_bits(tmp_path, capsys):
    _, elastic = family("nemotron")
    elastic.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--fits", "1MB", "--packed"]) == 2
    assert "no weights of this checkpoint are stored in few bits" in capsys.readouterr().err
    assert main(["plan", str(tmp_path)]) == 0
    assert "stored" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sizes", "axis"),
    [({"hidden": 40}, "hidden"), ({"expert_ffn": 24}, "expert_ffn"), ({"mamba_head_dim": 24}, "mamba_head_dim")],
)
def test_sizes_off_the_blocks_name_the_axis(sizes, axis, tmp_path, capsys):
    folder = tmp_path
    write_family(folder, "nemotron", {"mamba": "nvfp4", "experts": "nvfp4"})
    elastic = ElasticConfig.from_pretrained(folder)
    with pytest.raises(ElasticConfigError, match=f"cut by the axes: .*{axis}.*multiples of"):
        elastic.resolve(sizes)
    submodel = elastic.architecture.submodel(elastic.parent_config, sizes, "budget")
    with pytest.raises(ElasticConfigError, match=f"cut by the axes: .*{axis}"):
        ElasticForCausalLM.from_pretrained(folder, budget=submodel)
    ((name, size),) = sizes.items()
    assert main(["plan", str(folder), "--size", f"{name}={size}"]) == 2
    assert axis in capsys.readouterr().err
    plain = ElasticConfig.from_parent(elastic.parent_config, {})
    assert plain.resolve(sizes) == submodel, "sizes that a family in bfloat16 has"


def test_the_card_says_bytes_and_format(folders):
    elastic = ElasticConfig.from_pretrained(folders("nemotron"))
    text = str(render_card(elastic))
    head, _, *rows = [line for line in text.splitlines() if line.startswith("|")][: 2 + len(SIZES)]
    names = [cell.strip() for cell in head.strip("|").split(" | ")]
    for row in rows:
        cells = dict(zip(names, [cell.strip() for cell in row.strip("|").split(" | ")], strict=True))
        cost = elastic.costs()[cells["size"]]
        assert cells["stored, nvfp4"] == format_bytes(cost.stored_bytes(torch.bfloat16))
        assert cells["bfloat16, float16"] == format_bytes(cost.weight_bytes(torch.bfloat16))
        assert cells["download"].endswith(format_bytes(download_bytes(elastic, elastic.submodel(cells["size"]))))
    share = elastic.costs()["full"].coded_elements / elastic.costs()["full"].total_params
    assert f"14 weights, {share:.1%} of the parameters, are stored in nvfp4, the rest in bfloat16" in text
    assert 'Recipe: `"nvfp4"`' in text
    _, plain = family("nemotron")
    plain_text = str(render_card(plain))
    assert "few bits" not in plain_text
    assert "stored, " not in plain_text


@pytest.mark.parametrize("name", [pytest.param("nemotron", marks=pytest.mark.slow), "granite"])
def test_an_export_in_few_bits_is_counted_from_its_headers(name, folders, tmp_path, local_hub):
    export_checkpoint(folders(name), tmp_path / "half", "half", progress=False)
    config = AutoConfig.from_pretrained(tmp_path / "half")
    text = str(render_card(config))
    stored = ElasticConfig.from_pretrained(folders(name)).costs()["half"].stored_bytes(torch.bfloat16)
    (full,) = plan(str(tmp_path / "half"))
    assert full["stored_bytes"] == full["download_bytes"] == file_bytes(tmp_path / "half")
    assert stored <= full["stored_bytes"] < 1.01 * stored, "experts one by one have a scale more"
    assert f"| {format_bytes(stored)} |" in text
    assert "A program that decodes them" in text
    upload = prepare_upload(tmp_path / "half", "me/half")
    assert "stored in nvfp4" in str(upload.card)
