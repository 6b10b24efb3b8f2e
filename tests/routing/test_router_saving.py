"""A router saved with its model: what is written, what comes back, what slices and exports keep, and what limits between budgets give."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from compare import assert_same_logits, logits
from routed import PARENTS, PER_LAYER, config_of, routed
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from hf_elastic import CheckpointError, ElasticConfig, ElasticConfigError, ElasticForCausalLM
from hf_elastic.architectures.cost import CostModel
from hf_elastic.commands.plan import plan
from hf_elastic.routing.router import ROUTER_FILE, BudgetRouter, read_router

each_parent = pytest.mark.parametrize("name", PARENTS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            routed(name).save_pretrained(made[name])
        return made[name]

    return get


@pytest.fixture
def own(folders, tmp_path):
    return lambda name: Path(shutil.copytree(folders(name), tmp_path / "own"))


def same(ours: BudgetRouter, theirs: BudgetRouter) -> bool:
    wanted = theirs.state_dict()
    return ours.keys == theirs.keys and all(
        torch.equal(wanted[key], value) for key, value in ours.state_dict().items()
    )


# There and back


@each_parent
@pytest.mark.parametrize("layers", ["homogeneous", "per layer"])
def test_it_comes_back(name, layers, tmp_path, ids):
    model = routed(name, PER_LAYER[name] if layers == "per layer" else ())
    assert not any(key.startswith(("_router", "networks")) for key in model.state_dict())
    assert model.num_parameters() == CostModel(model.config).full.total_params
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"config.json", "model.safetensors", ROUTER_FILE}
    for auto in (AutoModelForCausalLM, AutoModel):
        again = auto.from_pretrained(tmp_path)
        assert same(again.router, model.router)
        assert not any(parameter.requires_grad for parameter in again.router.parameters())
        assert again.elastic_config.elastic == model.elastic_config.elastic
    decided = again.router.decide()
    assert {key: value.to_dict() for key, value in decided.submodels.items()} == {
        key: entry["sizes"] for key, entry in model.budgets.items()
    }
    assert decided.interpolated == again.elastic_config.between()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(logits(loaded, ids), logits(model, ids))
    loaded.save_pretrained(tmp_path / "again")
    for file in ("config.json", ROUTER_FILE):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_loading_draws_no_random_numbers(folders):
    model = ElasticForCausalLM.from_pretrained(folders("nano3"))
    for make in (
        lambda: read_router(model.elastic_config, folders("nano3")),
        lambda: model.router.rebuilt(model.elastic_config),
    ):
        torch.manual_seed(0)
        wanted = torch.rand(3)
        torch.manual_seed(0)
        assert same(make(), model.router)
        assert torch.equal(torch.rand(3), wanted)


def test_an_undecided_router_comes_back(tmp_path):
    model = routed("nano3", decide=False)
    model.save_pretrained(tmp_path)
    again = ElasticForCausalLM.from_pretrained(tmp_path)
    assert not again.budgets
    assert same(again.router, model.router)


def test_another_dtype_leaves_the_router_and_its_targets(tmp_path):
    model = routed("nano3")
    whole = CostModel(model.config).full.weight_bytes(torch.float32)
    model.elastic_config = config_of(model, "nano3")
    router = BudgetRouter(model.elastic_config, {"less": f"{whole / 2000:.3f}kB"})
    model.attach_router(router)
    assert model.elastic_config.elastic["router"]["targets"]["less"]["dtype"] == "float32"
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = ElasticForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in again.router.parameters()} == {torch.float32}
    assert again.router.limits == router.limits  # of float32 weights, as when it was made


def test_what_is_written(folders):
    section = json.loads((folders("nano3") / "config.json").read_text())["elastic"]
    assert section.keys() == {"version", "axes", "budgets", "interpolated", "router"}
    assert section["version"] == 2
    assert section["router"] == {"targets": {"large": 0.8, "small": 0.5}, "per_layer": [], "width": 256}
    assert all(entry.keys() == {"sizes", "total_params", "active_params"} for entry in section["interpolated"])
    assert len(section["interpolated"]) == 2


def test_copies_and_pickles(folders, ids):
    model = ElasticForCausalLM.from_pretrained(folders("nano3"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(other.router, model.router)
        assert other.router is not model.router
        assert other.router.decide().submodels == model.router.decide().submodels
        assert_same_logits(logits(other, ids), logits(model, ids))


def test_there_is_none_elsewhere(folders, family_folder, tmp_path):
    assert ElasticForCausalLM.from_pretrained(family_folder("nano3")).router is None
    config = ElasticConfig.from_pretrained(folders("nano3"))
    random = AutoModelForCausalLM.from_config(config)  # no weights, no router
    assert random.router is None
    assert "router" not in random.elastic_config.elastic
    assert random.elastic_config.interpolated
    random.save_pretrained(tmp_path)
    assert not (tmp_path / ROUTER_FILE).exists()


def test_one_that_is_taken_off_leaves_no_file(own):
    folder = own("nano3")
    model = ElasticForCausalLM.from_pretrained(folder)
    model.attach_router(None)
    model.save_pretrained(folder)
    assert not (folder / ROUTER_FILE).exists()
    assert ElasticForCausalLM.from_pretrained(folder).router is None


def test_resizing_the_vocabulary_keeps_it(folders, tmp_path):
    model = ElasticForCausalLM.from_pretrained(folders("nano3"))
    router, before = model.router, model.elastic_config.interpolated[0]
    model.resize_token_embeddings(70)
    assert same(model.router, router)
    assert model.elastic_config.interpolated[0]["sizes"] == before["sizes"]
    assert model.elastic_config.interpolated[0]["total_params"] > before["total_params"]
    model.save_pretrained(tmp_path)
    assert same(ElasticForCausalLM.from_pretrained(tmp_path).router, router)


def test_it_is_pushed(folders, local_hub):
    ElasticForCausalLM.from_pretrained(folders("nano3")).push_to_hub("me/tiny")
    pushed = local_hub.repositories["me/tiny"]
    names = {Path(name).name for name in pushed.commits[pushed.refs["main"]]}
    assert {"config.json", "model.safetensors", "added.safetensors", ROUTER_FILE} <= names


# Files that are not what the config says


def rewritten(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


DAMAGE = {
    "missing": (lambda file: file.unlink(), "is missing, though the config says"),
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:200]), "damaged or incomplete"),
    "no safetensors": (lambda file: file.write_text("router"), "damaged or incomplete"),
    "a tensor less": (lambda file: rewritten(file, lambda t: t.pop("networks.ffn.0.weight")), "networks.ffn.0.weight"),
    "another axis": (
        lambda file: rewritten(file, lambda t: t.update({"networks.fnn.0.weight": torch.ones(1)})),
        "networks.fnn.0.weight",
    ),
    "another width": (
        lambda file: rewritten(file, lambda t: t.update({"networks.ffn.0.weight": torch.ones(8, 3)})),
        "networks.ffn.0.weight.*other axes",
    ),
    "not finite": (
        lambda file: rewritten(file, lambda t: t["networks.ffn.0.weight"].fill_(float("nan"))),
        "or is damaged",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_router_is_an_error(what, own):
    damage, message = DAMAGE[what]
    folder = own("nano3")
    damage(folder / ROUTER_FILE)
    with pytest.raises(CheckpointError, match=message):
        ElasticForCausalLM.from_pretrained(folder)
    assert ElasticForCausalLM.from_pretrained(folder, budget="small").router is None  # a slice needs none


BAD_ROUTERS = {
    "unknown key": (lambda c: c["router"].update(std=1), r"unknown key 'std' in elastic\.router"),
    "missing key": (lambda c: c["router"].pop("width"), r"elastic\.router does not say width"),
    "a list": (lambda c: c.update(router=[]), r"elastic\.router=\[\] must be a dict"),
    "older format": (lambda c: c.update(version=1), r"unknown key '\w+' in elastic \(format 1\)"),
    "interpolated a dict": (lambda c: c.update(interpolated={}), r"elastic\.interpolated=\{\} must be a list"),
    "interpolated with a name": (
        lambda c: c["interpolated"][0].update(name="x"),
        r"unknown key 'name' in elastic\.interpolated\[0\]",
    ),
    "wrong count": (
        lambda c: c["interpolated"][0].update(active_params=3),
        "an interpolated submodel says active_params=3, its sizes have",
    ),
    "twice": (lambda c: c["interpolated"].append(c["interpolated"][0]), "are the same submodel"),
    "below all": (lambda c: c["budgets"].pop("small"), "lists a size that is smaller than every budget"),
    "not nested": (
        lambda c: c.update(interpolated=[{"sizes": {"hidden": 24}}]),
        r"does not nest in|same submodel|below every budget",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_ROUTERS)
def test_bad_sections_are_refused(what, own):
    change, message = BAD_ROUTERS[what]
    folder = own("nano3")
    config = json.loads((folder / "config.json").read_text())
    change(config["elastic"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ElasticConfigError, match=message):
        ElasticForCausalLM.from_pretrained(folder)


def test_values_that_no_router_has_are_refused(own):
    folder = own("nano3")
    text = (folder / "config.json").read_text()
    for change, message in (
        (lambda r: r.update(per_layer=["hidden"]), "per_layer='hidden' must be"),
        (lambda r: r.update(width=0), "width=0 of the router"),
        (lambda r: r.update(targets={"large": 3}), "out of reach"),
    ):
        config = json.loads(text)
        change(config["elastic"]["router"])
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ElasticConfigError, match=message):
            ElasticForCausalLM.from_pretrained(folder)


def test_a_config_that_describes_another_router_is_not_saved(folders, tmp_path):
    model = ElasticForCausalLM.from_pretrained(folders("nano3"))
    model.elastic_config.elastic["router"]["targets"]["large"] = 0.9
    with pytest.raises(CheckpointError, match="describes another router than the one that is attached"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_fails_whole(own, monkeypatch, listing):
    folder = own("nano3")
    model, before = ElasticForCausalLM.from_pretrained(folder), listing(folder)

    def full_disk(self, folder):
        (folder / ROUTER_FILE).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(BudgetRouter, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(folder)
    assert listing(folder) == before


# Slices and exports


@each_parent
def test_slices_drop_it_and_keep_what_nests(name, folders, tmp_path):
    folder = folders(name)
    whole = ElasticForCausalLM.from_pretrained(folder)
    small = ElasticForCausalLM.from_pretrained(folder, budget="large")
    assert small.router is None
    assert "router" not in small.elastic_config.elastic
    large = whole.elastic_config.submodel("large")
    kept = [member for member in whole.elastic_config.between() if member.nests_in(large)]
    assert kept
    assert [entry["total_params"] for entry in small.elastic_config.interpolated] == [
        CostModel(whole.config)(member).total_params for member in kept
    ]
    small.save_pretrained(tmp_path / "loaded")
    whole.save_pretrained(tmp_path / "saved", budget="large")
    for folder in (tmp_path / "loaded", tmp_path / "saved"):
        assert not (folder / ROUTER_FILE).exists()
        assert ElasticForCausalLM.from_pretrained(folder).elastic_config.elastic == small.elastic_config.elastic
    whole.save_pretrained(tmp_path / "whole", budget="full")
    assert (tmp_path / "whole" / ROUTER_FILE).exists()


@each_parent
def test_exports_are_stock(name, folders, tmp_path, ids):
    model = ElasticForCausalLM.from_pretrained(folders(name))
    model.export(tmp_path)
    assert not (tmp_path / ROUTER_FILE).exists()
    assert "elastic" not in json.loads((tmp_path / "config.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not isinstance(stock, ElasticForCausalLM)
    assert_same_logits(logits(stock, ids), logits(model, ids))


# Limits between budgets


@each_parent
def test_a_limit_between_budgets_gives_the_largest_that_fits(name, folders, ids, tmp_path):
    folder = folders(name)
    family = ElasticForCausalLM.from_pretrained(folder)
    config, count = family.elastic_config, CostModel(family.config)
    chain = [member for _, member in config.chain()]
    assert config.interpolated
    for member in config.between():
        cost = count(member)
        following = chain[chain.index(member) + 1]
        assert config.resolve(cost.total_params) == config.resolve(f"{cost.total_params}") == member
        assert config.resolve(cost.total_params - 1) == following
        active = [m for m in chain if count(m).active_params == cost.active_params]
        assert config.resolve(f"{cost.active_params} active") in active
        assert config.resolve(f"{cost.weight_bytes(torch.float32) / 1000}kB", torch.float32) == member
        memory = {"memory": cost.weight_bytes(torch.bfloat16) + cost.cache_bytes(99, 2), "dtype": "bfloat16"}
        assert config.resolve({**memory, "context_length": 99, "batch_size": 2}) == member
        assert (
            config.resolve(
                {"memory": memory["memory"] - 1, "dtype": "bfloat16", "context_length": 99, "batch_size": 2}
            )
            == following
        )
    member = config.between()[0]
    limit = count(member).total_params
    with family.at(limit):
        assert family.budget is None
        assert family.submodel == member
        live = logits(family, ids)
    assert not torch.equal(live, logits(family, ids))
    alone = AutoModelForCausalLM.from_pretrained(folder, budget=limit)
    assert alone.num_parameters() == limit
    assert_same_logits(logits(alone, ids), live)
    rows = plan(str(folder), budgets=[str(limit)])
    assert rows[-1]["name"] == str(limit)
    assert rows[-1]["total_params"] == limit
    assert [row["name"] for row in rows[:-1]] == [name for name, _ in config.chain()]
    # a slice of it nests the smaller ones, and a slice of a slice is the same slice
    assert list(alone.budgets) == [b for b in config.budgets if config.submodel(b).nests_in(member)]
    alone.save_pretrained(tmp_path)
    smaller = alone.elastic_config.interpolated
    if smaller:
        target = smaller[-1]["total_params"]
        twice = AutoModelForCausalLM.from_pretrained(tmp_path, budget=target)
        once = AutoModelForCausalLM.from_pretrained(folder, budget=target)
        assert_same_logits(logits(twice, ids), logits(once, ids))


@each_parent
def test_a_name_is_the_trained_one(name, folders):
    config = ElasticConfig.from_pretrained(folders(name))
    for budget in ("large", "small"):
        entry = config.budgets[budget]
        assert config.resolve(budget).to_dict() == entry["sizes"]
        assert config.name_of(config.resolve(entry["total_params"])) == budget
    with pytest.raises(ElasticConfigError, match="the smallest, 'small', needs"):
        config.resolve(config.budgets["small"]["total_params"] - 1)
