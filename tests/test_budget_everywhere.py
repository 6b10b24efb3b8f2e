"""`budget` means the same wherever it is written, and says the same however the size was asked for."""

from __future__ import annotations

import re

import pytest
import torch
from cases import VOCAB
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_elastic import BudgetWarning, ElasticConfig, ElasticForCausalLM, PhasePlan, elastify
from hf_elastic.checkpoints.memory import resolve_for_loading
from hf_elastic.cli import main
from hf_elastic.configuration_elastic import read_config

load = AutoModelForCausalLM.from_pretrained

SHARES = [0.56, "0.56", "56%", "58% active"]
"""What `medium` is of the nano3 family, or a little more."""


@pytest.fixture(scope="module")
def folder(family_folder):
    return family_folder("nano3")


@pytest.fixture(scope="module")
def family(folder):
    return load(folder)


def test_the_shares_are_what_they_are_said_to_be(folder):
    config = read_config(folder)
    full, medium = config.costs()["full"], config.costs()["medium"]
    assert 0.54 < medium.total_params / full.total_params < 0.56
    assert 0.56 < medium.active_params / full.active_params < 0.58


@pytest.mark.parametrize("share", SHARES, ids=repr)
def test_a_share_is_taken_wherever_a_budget_is(share, folder, family, tmp_path):
    medium = family.elastic_config.submodel("medium")
    assert load(folder, budget=share).budget == "medium"
    with family.at(share):
        assert family.budget == "medium"
        family.set_budget("large")
        family.set_budget(share)
        assert family.budget == "medium"
    assert family.sized(share).budget == "medium"
    assert resolve_for_loading(family.elastic_config, share, None) == medium
    ids = torch.randint(0, VOCAB, (1, 5), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    drafted = family.generate(ids, draft_budget=share, **settings)
    assert torch.equal(drafted.sequences, family.generate(ids, draft_budget="medium", **settings).sequences)
    plan = PhasePlan.from_dict(PhasePlan(share, "large", max_thinking_tokens=2, start=None).to_dict())
    assert plan.phases[0].budget == share
    family.save_pretrained(tmp_path / "slice", budget=share)
    assert read_config(tmp_path / "slice").cut_from["budget"] == "medium"


def test_a_phase_runs_at_a_share(family):
    from hf_elastic.generation import Phase

    ids = torch.randint(0, VOCAB, (1, 5), generator=torch.Generator().manual_seed(0))
    plan = PhasePlan(phases=[Phase("56%", "first", max_new_tokens=2), Phase(0.56, "second", max_new_tokens=2)])
    output = family.generate(ids, phase_plan=plan, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert [record.budget for record in output.phases] == ["medium", "medium"]


@pytest.mark.parametrize("share", [text for text in SHARES if isinstance(text, str)])
def test_commands_take_a_share(share, folder, tmp_path, capsys):
    assert main(["plan", str(folder), "--budget", share]) == 0
    medium, asked = (re.split(r"  +", line)[1:] for line in capsys.readouterr().out.splitlines()[4:7:2])
    assert medium == asked
    assert main(["slice", str(folder), str(tmp_path / "slice"), "--budget", share]) == 0
    assert read_config(tmp_path / "slice").cut_from["budget"] == "medium"


def test_a_share_of_a_slice_is_of_the_slice(folder):
    model = load(folder, budget="large")
    costs = model.elastic_config.costs()
    share = costs["medium"].total_params / costs["large"].total_params
    assert model.sized(f"{100 * share + 0.1:.2f}%").budget == "medium"
    assert model.sized("100%").budget == "large"


def test_lm_eval_gives_a_share_on(folder):
    utils = pytest.importorskip("lm_eval.utils")
    for text in ("budget=0.56", "budget=56%", "budget=58% active"):
        assert load(folder, **utils.simple_parse_args_string(text)).budget == "medium"


def test_a_command_says_in_its_words_what_it_found(folder, capsys):
    assert main(["plan", str(folder), "--budget", "12B", "--budget", "12B"]) == 0
    said = capsys.readouterr().err
    assert said.startswith(
        "hf-elastic plan: budget '12B' asks for 12.00B parameters, and the whole parent, which it gives, has "
    )
    assert said.count("\n") == 1
    assert main(["plan", str(folder), "--budget", "150%"]) == 2
    assert "'150%' is more than the whole parent" in capsys.readouterr().err


def test_loading_says_what_is_far(folder, family):
    with pytest.warns(BudgetWarning, match="the whole parent, which it gives") as caught:
        load(folder, budget="12B")
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(BudgetWarning, match="The next larger is 'medium'"):
        family.sized("50%")


# What a model says of its size


SIZES = {"hidden": 40, "expert_ffn": 12}


@pytest.mark.parametrize("budget", ["small", "SMALL", "24%", {"memory": "130kB"}, "sizes"])
def test_a_named_size_has_its_name_however_it_was_asked_for(budget, folder, family):
    config = family.elastic_config
    budget = config.submodel("small").to_dict() if budget == "sizes" else budget
    assert load(folder, budget=budget).budget == "small"
    assert family.sized(budget).budget == "small"
    with family.at(budget):
        assert family.budget == "small"


def test_a_size_without_a_name_has_none_however_it_was_asked_for(folder, family, tmp_path):
    with family.at(SIZES):
        assert family.budget is None
    slices = [load(folder, budget=SIZES), family.sized(SIZES)]
    slices[0].save_pretrained(tmp_path / "slice")
    slices += [load(tmp_path / "slice"), AutoModel.from_pretrained(folder, budget=SIZES)]
    for model in slices:
        assert model.budget is None
        assert list(model.budgets) == ["medium", "small"]
        with model.at("small"):
            assert model.budget == "small"
    assert load(folder).budget == family.budget == family.sized(None).budget == "full"
    assert load(folder, budget="100%").budget == "full"


def test_a_model_prints_its_sizes_and_where_it_is(folder, family):
    head, full, large, medium, small, *modules = str(family).splitlines()
    assert head == "ElasticNemotronHForCausalLM at full, with the sizes"
    assert re.fullmatch(r"  full    119,208 parameters  77,736 active  <- runs", full)
    assert re.fullmatch(r"  small +[\d,]+ parameters  [\d,]+ active", small)
    assert modules[0] == "ElasticNemotronHForCausalLM("
    with family.at("medium"):
        assert str(family).splitlines()[3].endswith("<- runs")
        assert "<- runs" not in str(family).splitlines()[1]
    with family.at(SIZES):
        assert str(family).splitlines()[0].startswith("ElasticNemotronHForCausalLM at {'hidden': 40,")
    assert str(load(folder, budget="small")).splitlines()[1].startswith("  small  ")
    assert repr(family.budgets).splitlines()[0].startswith("  large  ")
    assert "with the sizes" in repr(ElasticForCausalLM._from_config(family.elastic_config))


# Words that are not `budget`


ANY = ("budgets", "submodel", "family", "budget_", "size", "sizes", "Budget")
HINTED = [(cls, name) for cls in (AutoModelForCausalLM, AutoModel, ElasticForCausalLM) for name in ANY]
# Configs take any argument that they do not know, as upstream's do.
HINTED += [(cls, name) for cls in (AutoConfig, ElasticConfig) for name in ("budgets", "submodel", "family")]


@pytest.mark.parametrize(("cls", "name"), HINTED)
def test_other_words_for_a_budget_are_hinted_at(cls, name, folder):
    with pytest.raises(
        TypeError, match=rf"unexpected argument '{name}'.* Did you mean 'budget'\? .*budget='half', 0\.5"
    ):
        cls.from_pretrained(folder, **{name: "small"})


@pytest.mark.parametrize("name", ["axes", "interpolated", "resolve", "costs", "architecture"])
def test_what_a_config_says_itself_is_no_argument(name, folder):
    with pytest.raises(TypeError, match=f"unexpected argument '{name}': the config says that itself"):
        load(folder, **{name: "small"})


def test_generate_and_elastify_hint_at_their_own(family, original):
    with pytest.raises(
        AttributeError, match=r"only read here: call set_budget\('small'\), or: with model\.at\('small'\)"
    ):
        family.budget = "small"
    assert family.budget == "full"
    with pytest.raises(TypeError, match=r"unexpected argument 'budget'.*with model\.at\('half'\).*phase_plan="):
        family.generate(torch.ones(1, 2).long(), budget="small")
    with pytest.raises(TypeError, match=r"unexpected argument 'budget' of elastify\. Did you mean 'budgets'\?"):
        elastify(original("nano3"), axes=["ffn"], budget={"half": 0.5}, sort=False)
    with pytest.raises(TypeError, match=r"unexpected argument 'sample' of elastify\. Did you mean 'samples'\?"):
        elastify(original("nano3"), axes=["ffn"], sample=4, sort=False)
