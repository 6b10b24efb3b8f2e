"""Trainers of trl that load the policy a second time as their reference, by its name: they get the size that is trained."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BUDGETS, build_parent
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from runs import tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    NemotronHForCausalLM,
    PreTrainedModel,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from hf_elastic import ElasticForCausalLM, elastify
from hf_elastic.errors import ElasticConfigError

PAIRS = Dataset.from_list([{"prompt": f"HOW {i}?", "chosen": "YES, IT IS SO", "rejected": "NO"} for i in range(4)])
LABELLED = Dataset.from_list(
    [{"prompt": f"HOW {i}?", "completion": "YES, IT IS", "label": i % 2 == 0} for i in range(4)]
)
PROMPTS = Dataset.from_list([{"prompt": f"HOW {i}?"} for i in range(4)])
RUNS = ("dpo", "kto", "grpo", "rloo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, family_folder) -> Path:
    """The family with a tokenizer beside it, which the trainers look for by the name of the model, too."""
    made = tmp_path_factory.mktemp("family")
    load(family_folder("nano3")).save_pretrained(made)
    tokenizer().save_pretrained(made)
    return made


def make(kind: str, model: Any, output: Path, processing: Any = None, **fields: Any) -> Any:
    common: dict[str, Any] = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
    }
    if kind == "dpo":
        arguments = DPOConfig(**common | fields)
        return DPOTrainer(model, args=arguments, train_dataset=PAIRS, processing_class=processing)
    if kind == "kto":
        return KTOTrainer(model, args=KTOConfig(**common | fields), train_dataset=LABELLED)
    generating = {"max_completion_length": 4, "num_generations": 2, "beta": 0.1}
    trainer, config = (GRPOTrainer, GRPOConfig) if kind == "grpo" else (RLOOTrainer, RLOOConfig)
    return trainer(
        model,
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        args=config(**common | generating | fields),
        train_dataset=PROMPTS,
    )


def load(folder: Any, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def same(reference: PreTrainedModel, policy: dict[str, torch.Tensor]) -> bool:
    theirs = reference.state_dict()
    return theirs.keys() == policy.keys() and all(torch.equal(theirs[key], policy[key]) for key in policy)


@pytest.mark.parametrize("kind", RUNS)
def test_the_reference_of_a_slice_is_the_slice(folder, tmp_path, kind):
    small = load(folder, budget="small")
    before = copy.deepcopy(small.state_dict())
    trainer = make(kind, small, tmp_path)
    assert trainer.ref_model is not small
    assert same(trainer.ref_model, before)
    with torch.enable_grad():
        trainer.train()
    if kind == "dpo":
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    else:  # the policy is its reference before the first step
        assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert not same(trainer.model, before)
    assert same(trainer.ref_model, before)


@pytest.mark.parametrize("training", [False, True])
def test_the_reference_of_a_switched_family_is_the_size_it_runs_at(folder, tmp_path, training):
    model, small = load(folder), load(folder, budget="small")
    model.train(training).set_budget("medium")
    assert same(make("dpo", model, tmp_path).ref_model, load(folder, budget="medium").state_dict())
    model.eval().set_budget("small")
    assert same(make("dpo", model, tmp_path).ref_model, small.state_dict())
    model.train()
    assert same(make("dpo", model, tmp_path).ref_model, small.state_dict())


def test_the_reference_of_a_whole_family_is_the_family(folder, tmp_path):
    model = load(folder)
    with model.at("small"):
        pass
    with torch.enable_grad(), model.train().at("small"):
        pass
    trainer = make("dpo", model, tmp_path)
    assert same(trainer.ref_model, load(folder).state_dict())
    assert list(trainer.ref_model.budgets) == list(BUDGETS["nano3"])


def test_a_size_of_a_slice_is_counted_in_the_layers_of_the_family(folder, tmp_path):
    medium = load(folder, budget="medium")  # lacks layer 4
    medium.set_budget("small")
    assert same(make("dpo", medium, tmp_path).ref_model, load(folder, budget="small").state_dict())
    again = load(medium.name_or_path)
    assert again.submodel == load(folder, budget="small").submodel


def test_copies_and_configs_keep_the_size(folder):
    small = load(folder, budget="small")
    for name in (
        copy.deepcopy(small).config._name_or_path,
        copy.deepcopy(small.config)._name_or_path,
        pickle.loads(pickle.dumps(small.config))._name_or_path,
        small.elastic_config._name_or_path,
    ):
        assert name == str(folder)
        assert same(load(name), small.state_dict())
    assert load(str(small.name_or_path)).num_parameters() > small.num_parameters()
    assert load(small.name_or_path, budget="large").budget == "large"
    assert set(AutoTokenizer.from_pretrained(small.name_or_path).get_vocab()) == set(tokenizer().get_vocab())


def test_a_size_that_was_never_saved_is_refused(tmp_path):
    parent = tmp_path / "parent"
    build_parent("nano3").save_pretrained(parent)
    tokenizer().save_pretrained(parent)
    stock = AutoModelForCausalLM.from_pretrained(parent)
    model = elastify(stock, budgets=BUDGETS["nano3"], sort=False)
    assert same(make("dpo", model, tmp_path / "run").ref_model, stock.state_dict())
    model.set_budget("small")
    live, own = model.name_or_path, model.sized("small")
    smaller = model.sized("medium")
    smaller.set_budget("small")
    for size in (model, own, smaller):
        assert str(size.name_or_path) == str(parent)
        with pytest.raises(ElasticConfigError, match="Save the family.*ref_model="):
            make("dpo", size, tmp_path / "run")
    for name in (live, own.name_or_path, own.config._name_or_path, own.elastic_config._name_or_path):
        with pytest.raises(ElasticConfigError, match="Save the family"):
            load(name)
    reference = copy.deepcopy(model)
    assert DPOTrainer(model, reference, args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=PAIRS)


@pytest.mark.parametrize("auto", [False, True])
def test_a_size_of_a_plain_checkpoint_that_is_described_by_hand(tmp_path, auto):
    build_parent("nano3").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    small = ElasticForCausalLM.from_pretrained(tmp_path, elastic_config=BUDGETS["nano3"], budget="small")
    reference = load(small.name_or_path) if auto else make("dpo", small, tmp_path / "run").ref_model
    assert same(reference, small.state_dict())


def test_an_export_whose_layers_differ(folder, tmp_path):
    load(folder).export(tmp_path / "medium", "medium", heterogeneous=True)
    tokenizer().save_pretrained(tmp_path / "medium")
    medium = ElasticForCausalLM.from_pretrained(tmp_path / "medium")
    assert same(make("dpo", medium, tmp_path / "run").ref_model, medium.state_dict())


@pytest.mark.parametrize("budget", [None, "small"])
def test_the_revision_that_was_loaded(local_hub, folder, tmp_path, budget):
    first = local_hub.commit("someone/nano3", folder)
    newer = load(folder)
    for parameter in newer.parameters():
        parameter.mul_(1.5)
    newer.save_pretrained(tmp_path / "newer")
    tokenizer().save_pretrained(tmp_path / "newer")
    local_hub.commit("someone/nano3", tmp_path / "newer")
    old = load("someone/nano3", budget=budget, revision=first)
    trainer = make("dpo", old, tmp_path / "run")
    assert same(trainer.ref_model, load(folder, budget=budget).state_dict())
    assert trainer.ref_model.config._attn_implementation == old.config._attn_implementation
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.base_model == "someone/nano3"
    assert "python/object" not in str(card)


def test_a_config_that_was_written_by_hand(family_folder, tmp_path):
    shutil.copytree(family_folder("nano3"), tmp_path / "by_hand")  # by ElasticConfig.save_pretrained
    tokenizer().save_pretrained(tmp_path / "by_hand")
    small = load(tmp_path / "by_hand", budget="small")
    assert same(make("dpo", small, tmp_path / "run").ref_model, small.state_dict())


def test_a_subfolder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "repo" / "nested")
    small = load(tmp_path / "repo", subfolder="nested", budget="small")
    assert same(make("dpo", small, tmp_path / "run").ref_model, small.state_dict())


def test_a_size_of_a_family_that_is_nowhere(tmp_path):
    family = elastify(build_parent("nano3"), budgets=BUDGETS["nano3"], sort=False)
    own = family.sized("small")
    family.set_budget("small")
    for size in (family, own):
        for again in (AutoConfig.from_pretrained, ElasticForCausalLM.from_pretrained):
            with pytest.raises(ElasticConfigError, match="Save the family"):
                again(size.config._name_or_path)
        with pytest.raises(ElasticConfigError, match="Save the family"):
            make("dpo", size, tmp_path, tokenizer())


def nested(folder: Path, output: Path) -> Path:
    load(folder).save_pretrained(output, layout="nested")
    tokenizer().save_pretrained(output)
    return output


def check_reference(policy: Any, output: Path) -> None:
    before = copy.deepcopy(policy.state_dict())
    trainer = make("dpo", policy, output, tokenizer())
    assert type(trainer.ref_model).__mro__[0] is type(policy)
    assert same(trainer.ref_model, before)
    with torch.enable_grad():
        trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("auto", [False, True])
def test_the_smallest_size_as_a_stock_model(folder, tmp_path, auto):
    place, wanted = nested(folder, tmp_path / "nested"), load(folder, budget="small").state_dict()
    load_size = load if auto else NemotronHForCausalLM.from_pretrained
    policy = load_size(place, subfolder="budgets/small")
    assert type(policy) is NemotronHForCausalLM
    assert same(policy, wanted)
    assert same(load(policy.config._name_or_path), wanted)
    assert same(load(pickle.loads(pickle.dumps(policy.config))._name_or_path), wanted)
    check_reference(policy, tmp_path / "run")


def test_an_adapter_of_the_smallest_size(folder, tmp_path, ids):
    place = nested(folder, tmp_path / "nested")
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(load(place, subfolder="budgets/small"), lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert same(again, adapted.state_dict())
    torch.testing.assert_close(again(ids).logits, adapted(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("base", [False, True])
def test_the_smallest_size_of_a_repository_as_a_stock_model(local_hub, folder, tmp_path, base):
    first = local_hub.commit("someone/nested", nested(folder, tmp_path / "nested"))
    auto = AutoModel if base else AutoModelForCausalLM
    for options in ({}, {"revision": first}):
        policy = auto.from_pretrained("someone/nested", subfolder="budgets/small", dtype=torch.float32, **options)
        for name in (policy.name_or_path, policy.config._name_or_path):
            assert name == "someone/nested"
            again = auto.from_pretrained(name, dtype=torch.float32)
            assert type(again) is type(policy)
            assert same(again, policy.state_dict())
    if not base:
        check_reference(policy, tmp_path / "run")


@pytest.mark.parametrize("budget", [None, "small"])
def test_a_subfolder_of_a_repository(local_hub, folder, tmp_path, budget):
    shutil.copytree(folder, tmp_path / "repo" / "inner")
    commit = local_hub.commit("someone/repo", tmp_path / "repo")
    policy = load("someone/repo", subfolder="inner", budget=budget)
    for options in ({}, {"revision": commit}):
        assert same(load(policy.config._name_or_path, **options), policy.state_dict())
    again = AutoConfig.from_pretrained(pretrained_model_name_or_path=policy.config._name_or_path)
    assert again.model_type == "elastic"
    check_reference(policy, tmp_path / "run")


def test_stock_classes_take_their_argument_by_name(tmp_path):
    build_parent("nano3").save_pretrained(tmp_path)
    again = NemotronHForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path)
    assert same(again, build_parent("nano3").state_dict())
    assert again.name_or_path == str(tmp_path)
