"""The nested layout: every element once, in the files of the first budget that keeps it; the same weights as in the stock layout."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cases import BUDGETS, CASES, IDS, parent_config
from compare import assert_same_logits, assert_same_weights, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import hf_elastic.checkpoints.nested as nested
from hf_elastic import CheckpointError, ElasticConfig, ElasticConfigError, ElasticForCausalLM, UnknownBudgetError
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.cost import CostModel
from hf_elastic.architectures.pieces import pieces
from hf_elastic.checkpoints.parts import common, layouts
from hf_elastic.cli import main
from hf_elastic.storage import streaming
from hf_elastic.submodels.slicing import slice_state_dict

load = AutoModelForCausalLM.from_pretrained
FAMILIES = {
    **BUDGETS,
    "granite_tied": {"small": {"hidden": 24, "experts": 4}},
    "nano3_latent": {
        "a/b": {"experts": 6},
        "A-B": {"experts": 6, "experts_per_token": 2},
        "..": {"experts": 6, "experts_per_token": 2, "expert_ffn": {1: 8, 3: 4}},
    },
}
each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def folders(original, tmp_path_factory):
    """Folder of a family in the stock and in the nested layout; not to be changed."""
    made = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            original(name).save_pretrained(folder / "stock")
            ElasticConfig.from_parent(original(name).config, FAMILIES[name]).save_pretrained(folder / "stock")
            load(folder / "stock").save_pretrained(folder / "nested", layout="nested")
            made[name] = folder / "stock", folder / "nested"
        return made[name]

    return get


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    """A nested checkpoint of one's own, to be damaged."""
    return Path(shutil.copytree(folders("nano3")[1], tmp_path / "nested"))


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["elastic"]["files"])
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, file: str, change) -> None:
    """Change the tensors of a file, and what the config says about its size."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    budget = next(name for name, files in files_of(folder).items() if file in files)
    edit(folder, lambda files: files[budget].update({file: (folder / file).stat().st_size}))


def files_of(folder: Path) -> dict[str, dict[str, int]]:
    return json.loads((folder / "config.json").read_text())["elastic"]["files"]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{f}:{k}": t for f in sorted(folder.rglob("*.safetensors")) for k, t in load_file(f).items()}


# The algebra


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.startswith(("all", "layers_without_m"))], ids=IDS
)
def test_every_element_lies_in_the_part_of_the_first_budget_that_keeps_it(case):
    """Against masks, which know nothing of blocks."""
    config = parent_config(case.parent)
    architecture = get_architecture(config.model_type)
    levels = [case.submodel, case.middle, architecture.full(config)]
    kept = [{piece.rule.name: piece for piece in pieces(architecture, config, level)} for level in levels]
    for name, whole in kept[-1].items():
        here = [level.get(name) for level in kept]
        first = sum(1 - p.rule.mask(p.full, p.kept) if p else torch.ones(whole.shape) for p in here)
        for stored in layouts(whole.rule, here, architecture):
            found = torch.full(whole.rule.shape(whole.full), -1.0)
            names = [name for part in stored.parts for name in part.names]
            assert len(set(names)) == len(names)
            assert len(stored.parts) <= 1 + 2 * found.ndim
            for part in stored.parts:
                index = [torch.tensor([i for run in runs for i in range(*run)]) for runs in part.region]
                place = torch.meshgrid(*index, indexing="ij")
                one_by_one = part.apart is not None and whole.rule.stacked
                expected = place[0].shape[one_by_one:]
                assert sum(s.numel() for s in map(torch.Size, (s for _, s in part.shapes()))) == place[0].numel()
                assert len(part.names[0]) > 1 or {s for _, s in part.shapes()} <= {expected}
                assert len(part.names) == (len(index[0]) if one_by_one else 1)
                assert (found[place] == -1).all()
                found[place] = part.level
            assert torch.equal(found, first)


def test_common_ranges_of_regions():
    runs, others = [(0, 4), (6, 9), (12, 13)], [(2, 7), (8, 20)]
    assert list(common(runs, others)) == [
        ((2, 4), (0, 2)),
        ((4, 5), (4, 5)),
        ((6, 7), (5, 6)),
        ((7, 8), (9, 10)),
    ]


# What is written and read


def test_what_larger_budgets_add_to_experts_is_one_tensor_a_layer(folders):
    """Part by part against the stock checkpoint: of the experts that the smallest budget has, and of those it has not."""
    stock, folder = folders("nano3")
    whole = load_file(stock / "model.safetensors")
    config = ElasticConfig.from_pretrained(folder)
    first, second = (config.family()[name].at(1) for name in ("small", "medium"))
    added = load_file(folder / ADDED)
    names = [name for name in added if ".1.mixer.experts." in name]
    assert all(added[name].ndim == 3 for name in names)
    up = torch.stack([whole[f"backbone.layers.1.mixer.experts.{i}.up_proj.weight"] for i in range(12)])
    up = up[:, : second["expert_ffn"], : second["hidden"]]
    assert (config.parent_config.n_group, first["experts"], second["experts"]) == (2, 6, 8)
    old, new = [0, 1, 2, 6, 7, 8], [3, 9]  # of two groups of six, the smallest budget keeps three each, the next four
    regions = {
        0: up[new],
        1: up[old, first["expert_ffn"] :],
        2: up[old, : first["expert_ffn"], first["hidden"] :],
    }
    expected = {f"model.layers.1.mixer.experts.up_proj.level1.dim{i}": part for i, part in regions.items()}
    assert_same_weights({name: added[name] for name in names if "up_proj" in name}, expected)


@each_family
def test_nested_stock_and_reassembled_checkpoints_are_the_same(name, folders, original, tmp_path):
    stock, folder = folders(name)
    config = ElasticConfig.from_pretrained(folder)
    budgets = [*config.family()]
    assert set(files_of(folder)) == set(budgets)
    whole = CostModel(config.parent_config).full.total_params
    for budget in (*budgets, {"expert_ffn": 4}, whole - 1):
        state = original(name).state_dict()
        expected = slice_state_dict(config.architecture, original(name).config, state, config.resolve(budget))
        assert_same_weights(load(folder, budget=budget), expected)
    load(folder).save_pretrained(tmp_path / "again")
    assert_same_weights(load_file(tmp_path / "again/model.safetensors"), load_file(stock / "model.safetensors"))
    pieces_there = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    assert pieces_there == sum(tensor.nbytes for tensor in tensors_of(stock).values())
    assert not list(folder.glob("*.safetensors*"))
    assert ElasticConfig.from_pretrained(folder).elastic["version"] == 3
    assert "files" not in load(folder).elastic_config.elastic


@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_the_smallest_budget_alone_is_a_stock_checkpoint(name, folders, original, tmp_path, ids):
    stock, folder = folders(name)
    expected = load(stock, budget="small")
    shutil.copytree(folder / "budgets/small", tmp_path / "alone")
    model, info = load(tmp_path / "alone", output_loading_info=True)
    assert type(model) is type(original(name))
    assert not any(info.values())
    assert_same_weights(model, expected)
    assert_same_logits(logits(model, ids), logits(expected, ids))
    assert type(load(folder, subfolder="budgets/small")) is type(original(name))
    expected.export(tmp_path / "exported")
    assert_same_weights(
        load_file(tmp_path / "alone/model.safetensors"), load_file(tmp_path / "exported/model.safetensors")
    )
    theirs, mine = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("exported", "alone"))
    assert theirs == mine


def test_a_smallest_budget_that_differs_per_layer_loads_through_this_package(folders):
    stock, folder = folders("nano3_latent")
    model = ElasticForCausalLM.from_pretrained(folder, subfolder="budgets/budget")
    assert_same_weights(model, load(stock, budget=".."))


def test_folders_have_names_that_every_system_takes(folders):
    names = nested.folder_names(["a b", "A/b", "..", "ä", "a-b", "12b"])
    assert list(names.values()) == ["a-b", "A-b-2", "budget", "budget-2", "a-b-3", "12b"]
    _, folder = folders("nano3_latent")
    assert files_of(folder)["a/b"] == {}, "only the experts per token differ, and that is no weight"


def test_a_size_needs_the_files_up_to_its_own(folder, folders):
    stock = folders("nano3")[0]
    for larger in ("full", "large"):
        shutil.rmtree(folder / "budgets" / larger)
    for budget in ("small", "medium", {"hidden": 32, "layers": [0, 2, 6, 7], "mamba_heads": 4, "expert_ffn": 8}):
        assert_same_weights(load(folder, budget=budget), load(stock, budget=budget))
    for budget, missing in (("large", "large"), (None, "large"), ({"mamba_heads": 8}, "large")):
        with pytest.raises(
            CheckpointError, match=f"budgets/{missing}/added.safetensors is missing, though config.json lists it"
        ):
            load(folder, budget=budget)


def test_a_budget_without_files_of_its_own_reads_those_of_the_next_larger(folder, folders):
    config = ElasticConfig.from_pretrained(folder)
    files = config.elastic["files"]
    section = ElasticConfig.from_parent(config.parent_config, {**FAMILIES["nano3"], "new": {"mamba_heads": 8}}).elastic
    section = {key: value for key, value in section.items() if key != "version"}
    ElasticConfig(parent_config=config.parent_config, elastic={**section, "files": files}).save_pretrained(folder)
    shutil.rmtree(folder / "budgets/full")
    with pytest.raises(CheckpointError, match="budgets/full/added.safetensors is missing"):
        load(folder, budget="new")
    assert_same_weights(load(folder, budget="large"), load(folders("nano3")[0], budget="large"))


@pytest.mark.parametrize("how", ["sharded", "bfloat16", "stacked experts", "base model", "slice"])
def test_ways_to_save(how, folders, tmp_path):
    stock, _ = folders("nano3")
    arguments = {"sharded": {"max_shard_size": "20KB"}, "stacked experts": {"save_original_format": False}}.get(
        how, {}
    )
    auto = AutoModel if how == "base model" else AutoModelForCausalLM
    model = auto.from_pretrained(
        stock, dtype="bfloat16" if how == "bfloat16" else "float32", budget="medium" if how == "slice" else None
    )
    model.save_pretrained(tmp_path / "nested", layout="nested", **arguments)
    assert_same_weights(auto.from_pretrained(tmp_path / "nested"), model)
    small = auto.from_pretrained(tmp_path / "nested", budget="small")
    model.set_budget("small")
    assert_same_weights(small, model)
    if how != "base model":  # a stock class would look for its head
        assert_same_weights(load(tmp_path / "nested/budgets/small", dtype="auto"), small)
    else:
        assert_same_weights(AutoModel.from_pretrained(tmp_path / "nested/budgets/small"), small)
    if how == "sharded":
        assert len(list((tmp_path / "nested/budgets/small").glob("model-*.safetensors"))) > 2
        assert max(file.stat().st_size for file in (tmp_path / "nested").rglob("*.safetensors")) < 40_000


def test_only_the_size_is_allocated(folders, monkeypatch):
    largest = max(tensor.numel() for tensor in load(folders("nano3")[0], budget="medium").state_dict().values())
    made, real = [], torch.empty

    def record(*args, **kwargs):
        out = real(*args, **kwargs)
        made.append(0 if out.is_meta else out.numel())
        return out

    monkeypatch.setattr(torch, "empty", record)
    load(folders("nano3")[1], budget="medium")
    assert 0 < max(made) <= largest


def test_commands(folders, tmp_path, capsys):
    _, folder = folders("nano3")
    assert main(["plan", str(folder)]) in (0, None)
    assert "medium" in capsys.readouterr().out
    main(["slice", str(folder), str(tmp_path / "slice"), "--budget", "medium"])
    main(["export", str(folder), str(tmp_path / "export"), "--budget", "small"])
    assert_same_weights(load(tmp_path / "slice"), load(folder, budget="medium"))
    assert_same_weights(load(tmp_path / "export"), load(folder, budget="small"))


# Saving over something


def test_layouts_replace_each_other(folder, folders):
    (folder / "notes.txt").write_text("mine")
    (folder / "budgets/small/notes.txt").write_text("mine")
    family = load(folders("nano3")[0])
    family.save_pretrained(folder)
    left = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert left == {
        "notes.txt",
        "modeling_elastic.py",
        "budgets/small/notes.txt",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "weights.checksums.json",
    }
    assert [path.name for path in (folder / "budgets").iterdir()] == ["small"]
    family.save_pretrained(folder, layout="nested", max_shard_size="50KB")
    family.save_pretrained(folder, layout="nested", budget="medium")
    assert sorted(files_of(folder)) == ["medium", "small"]
    weights = {str(file.relative_to(folder)) for file in folder.rglob("*.safetensors*")}
    assert weights == {file for files in files_of(folder).values() for file in files}
    assert_same_weights(load(folder), load(folders("nano3")[0], budget="medium"))


@pytest.mark.parametrize("where", ["writing", "exchanging"])
@pytest.mark.parametrize("over", ["nested", "stock"])
def test_a_failed_save_leaves_the_old_checkpoint(where, over, folders, tmp_path, monkeypatch, listing):
    model = load(folders("nano3")[0], budget="medium")
    folder = Path(shutil.copytree(folders("nano3")[over == "nested"], tmp_path / over))
    before, count, save, move = listing(folder), iter(range(9)), streaming.write_tensors, os.replace

    def full_disk(*args):
        if where == "writing" and next(count) == 1:
            raise OSError(28, "No space left on device")
        save(*args)

    def busy(source, target):
        if where == "exchanging" and Path(target).is_relative_to(folder / "budgets") and next(count) == 1:
            raise OSError(28, "No space left on device")
        move(source, target)

    monkeypatch.setattr(streaming, "write_tensors", full_disk)
    monkeypatch.setattr("hf_elastic.checkpoints.saving.os.replace", busy)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder, layout="nested")
    assert listing(folder) == before
    assert (folder / "budgets").exists() == (over == "nested")


def test_what_the_layout_does_not_have_is_refused(folders, tmp_path):
    model = load(folders("nano3")[0], budget="small")
    with pytest.raises(ElasticConfigError, match="layout='nestd' must be one of 'stock', 'nested'"):
        model.save_pretrained(tmp_path / "new", layout="nestd")
    with pytest.raises(ElasticConfigError, match="variant='fp16': the nested layout has no variants"):
        model.save_pretrained(tmp_path / "new", layout="nested", variant="fp16")
    with pytest.raises(TypeError, match="'layuot'. Did you mean 'layout'"):
        model.save_pretrained(tmp_path / "new", layuot="nested")
    assert not list(tmp_path.iterdir())
    (tmp_path / "budgets").write_text("mine")
    with pytest.raises(CheckpointError, match="budgets"):
        model.save_pretrained(tmp_path, layout="nested")
    assert [file.name for file in tmp_path.iterdir()] == ["budgets"]
    with pytest.raises(CheckpointError, match="variant='fp16'.*nested layout, which has no variants"):
        load(folders("nano3")[1], variant="fp16")


# Bad input


@pytest.fixture
def no_weights_placed(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("the stock loader was called")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", refuse)


ADDED, SMALL = "budgets/medium/added.safetensors", "budgets/small/model.safetensors"
NOT_INSIDE = "is not a safetensors file in the checkpoint's folder; it is not opened"
BAD_FILES = {
    "no dict": (lambda f: f.update(small=[SMALL]), r"elastic.files\['small'\]=.* must be a dict from file to bytes"),
    "unknown budget": (lambda f: f.update(tiny=f.pop("small")), "files for 'tiny', which is no budget; there are"),
    "no whole": (lambda f: f.pop("full"), "no files for 'full', the whole parent; the checkpoint is incomplete"),
    "above": (lambda f: f["small"].update({"../x.safetensors": 9}), NOT_INSIDE),
    "hidden above": (lambda f: f["small"].update({"a/.. /x.safetensors": 9}), NOT_INSIDE),
    "absolute": (lambda f: f["small"].update({"/etc/x.safetensors": 9}), NOT_INSIDE),
    "drive": (lambda f: f["small"].update({"C:x.safetensors": 9}), NOT_INSIDE),
    "backslash": (lambda f: f["small"].update({"..\\x.safetensors": 9}), NOT_INSIDE),
    "pickle": (lambda f: f["small"].update({"budgets/small/model.bin": 9}), NOT_INSIDE),
    "twice": (
        lambda f: f["large"].update({SMALL: f["small"][SMALL]}),
        "names 'budgets/.*' twice, or in two spellings",
    ),
    "two spellings": (
        lambda f: f["large"].update({SMALL.upper().replace(".SAFETENSORS", ".safetensors"): 9}),
        "two spellings",
    ),
    "no number": (lambda f: f["small"].update({SMALL: "9"}), "='9' must be a number of bytes"),
    "nothing": (lambda f: f["small"].update({SMALL: 0}), "=0 must be a number of bytes"),
    "another size": (
        lambda f: f["small"].update({SMALL: 9}),
        r"has [\d,]+ bytes, config.json says 9: it was not completely",
    ),
    "another file": (
        lambda f: f["medium"].update({"budgets/b.safetensors": 9}),
        r"budgets/b.safetensors is missing, though config.json",
    ),
    "a file less": (lambda f: f.update(medium={}), r"level1.* is missing.*Nothing was loaded"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_lists_of_files_that_do_not_hold_together(case, folder, no_weights_placed):
    change, message = BAD_FILES[case]
    edit(folder, change)
    with pytest.raises((ElasticConfigError, CheckpointError), match=message):
        load(folder, budget="medium")


def test_every_part_is_needed(folder, no_weights_placed):
    tensors = load_file(folder / ADDED)
    assert len(tensors) > 50
    for name in list(tensors)[::9]:
        rewrite(folder, ADDED, lambda t, name=name: (t.clear(), t.update(tensors), t.pop(name)))
        with pytest.raises(
            CheckpointError, match=f"{name} is missing.*Nothing was loaded".replace(".", r"\.").replace(r"\.*", ".*")
        ):
            load(folder, budget="medium")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.update({n: t[n][1:].clone()}), r"in the file, the config says"),
        (lambda t, n: t.update({n: t[n].to(torch.bfloat16)}), "the parts of .* are stored as BF16 and F32"),
        (lambda t, n: t.update({n: t[n].to(torch.int32)}), "is stored as I32, not as"),
        (lambda t, n: t.update({f"{n}.more": t[n].clone()}), "dim1.more belongs to no part of this"),
        (
            lambda t, n: t.update({n.partition(".level")[0]: t[n].clone()}),
            "experts.up_proj belongs to no part of this",
        ),
    ],
    ids=["another shape", "another type", "no weights", "one more", "a name of another budget"],
)
def test_parts_that_do_not_fit(change, message, folder, no_weights_placed):
    name = next(name for name in load_file(folder / ADDED) if name.endswith("up_proj.level1.dim1"))
    rewrite(folder, ADDED, lambda tensors: change(tensors, name))
    with pytest.raises(CheckpointError, match=message):
        load(folder, budget="medium")


def test_files_of_two_budgets_exchanged(folder, no_weights_placed):
    first, second = folder / SMALL, folder / ADDED
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    edit(folder, lambda f: (f["small"].update({SMALL: len(data[1])}), f["medium"].update({ADDED: len(data[0])})))
    with pytest.raises(CheckpointError, match="do not fit the config"):
        load(folder, budget="small")


@pytest.mark.parametrize("lie", ["offsets", "shape", "length"])
def test_headers_that_lie_are_refused_before_anything_is_allocated(lie, folder, no_weights_placed, monkeypatch):
    """A header that promises terabytes, in a file of the size that config.json says."""
    data = (folder / ADDED).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header[next(name for name in header if name.endswith("up_proj.level1.dim1"))]
    if lie == "offsets":
        entry["data_offsets"] = [0, 2**42]
    if lie == "shape":
        entry["shape"] = [2**40, entry["shape"][1]]
    text = json.dumps(header).encode().ljust(length + 400)
    said = 2**62 if lie == "length" else len(text)
    (folder / ADDED).write_bytes(said.to_bytes(8, "little") + text + data[8 + length :])
    edit(folder, lambda f: f["medium"].update({ADDED: (folder / ADDED).stat().st_size}))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("something was allocated"))
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load(folder, budget="medium")


@pytest.mark.parametrize("layout", ["nested", "stock"])
def test_links_out_of_the_folder_are_not_followed(layout, folder, folders, tmp_path, no_weights_placed):
    if layout == "stock":
        folder = tmp_path / "stock"
        shutil.copytree(folders("nano3")[0], folder)
        (folder / "a.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").unlink()
        index = {"weight_map": dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    file = folder / (SMALL if layout == "nested" else "a.safetensors")
    shutil.move(file, tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="is a link out of .*; it is not opened"):
        load(folder, budget="small")


def test_a_link_within_the_folder_is_followed(folder, folders):
    shutil.move(folder / SMALL, folder / "x.safetensors")
    (folder / SMALL).symlink_to(folder / "x.safetensors")
    expected = load(folders("nano3")[0], budget="small")
    assert_same_weights(load(folder, budget="small"), expected)


def test_unknown_budgets_are_refused_before_files_are_looked_for(folder):
    shutil.rmtree(folder / "budgets")
    with pytest.raises(UnknownBudgetError, match="unknown budget 'smal'"):
        load(folder, budget="smal")
