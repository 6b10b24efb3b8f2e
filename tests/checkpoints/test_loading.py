"""What users expect of a `PreTrainedModel` holds for a slice and for the whole family."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from cases import VOCAB, build_parent
from compare import assert_same_logits, assert_same_weights, logits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.generation import GenerationMixin

import hf_elastic.modeling_elastic as modeling
from hf_elastic import ElasticConfig, ElasticForCausalLM, ElasticModel
from hf_elastic.architectures import get_architecture

load = AutoModelForCausalLM.from_pretrained
BUDGETS = [None, "medium", "small"]
NAMES = ["nano3", "granite"]
each_model = pytest.mark.parametrize("name", NAMES)
each_budget = pytest.mark.parametrize("budget", BUDGETS)


@pytest.fixture(scope="module")
def loaded(family_folder):
    """Slices that no test changes."""
    models = {}

    def get(name, budget=None):
        if (name, budget) not in models:
            models[name, budget] = load(family_folder(name), budget=budget)
        return models[name, budget]

    return get


@pytest.fixture(scope="module")
def tokenizer():
    """One word per id, `t0` to `t63`."""
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0")


@pytest.fixture
def with_tokenizer(own_folder, tokenizer):
    def get(name):
        folder = own_folder(name)
        tokenizer.save_pretrained(folder)
        return folder

    return get


# What comes back


@each_model
@each_budget
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel], ids=["causal", "base"])
def test_the_class_is_the_stock_one_with_sizes(name, budget, auto, family_folder, original):
    model = auto.from_pretrained(family_folder(name), budget=budget)
    stock = type(original(name)) if auto is AutoModelForCausalLM else type(original(name).model)
    assert isinstance(model, stock)
    assert isinstance(model, ElasticForCausalLM if auto is AutoModelForCausalLM else ElasticModel)
    assert isinstance(model, GenerationMixin) == (auto is AutoModelForCausalLM)
    assert type(model).__name__ == f"Elastic{stock.__name__}"
    assert getattr(modeling, type(model).__name__) is type(model)
    assert type(model.config) is stock.config_class
    assert not model.training
    assert all(not parameter.is_meta for parameter in model.parameters())


@each_model
@each_budget
def test_the_elastic_class_loads_as_the_auto_class_does(name, budget, family_folder, loaded):
    assert_same_weights(ElasticForCausalLM.from_pretrained(family_folder(name), budget=budget), loaded(name, budget))


@each_model
def test_the_names_of_the_loaded_size(name, loaded):
    assert loaded(name).budget == "full"
    assert list(loaded(name).budgets) == ["large", "medium", "small"]
    assert loaded(name, "small").budget == "small"
    assert list(loaded(name, "small").budgets) == ["small"]
    count = loaded(name, "small").num_parameters()
    assert loaded(name).budgets["small"]["total_params"] == count
    assert loaded(name, "small").budgets["small"]["total_params"] == count


@each_model
@each_budget
def test_loading_info_is_empty(name, budget, family_folder):
    _, info = load(family_folder(name), budget=budget, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == set()
    assert not info["error_msgs"]


@each_model
@each_budget
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_generation(name, budget, do_sample, loaded, ids):
    torch.manual_seed(0)
    prompt = ids[:, :5]
    out = loaded(name, budget).generate(prompt, max_new_tokens=4, do_sample=do_sample, pad_token_id=0)
    assert out.shape == (2, 9)
    assert torch.equal(out[:, :5], prompt)


@each_model
def test_generation_with_left_padding(name, loaded, ids):
    """A padded row continues as it does alone."""
    model, settings = loaded(name, "small"), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:1, :6]], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 6, dtype=torch.long)], dim=1)
    alone = model.generate(ids[:1, :6], attention_mask=mask[:, 3:], **settings)
    together = model.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(together[:, 3:], alone)


@each_model
def test_beam_search(name, loaded, ids):
    out = loaded(name, "small").generate(ids[:, :5], max_new_tokens=3, num_beams=2, pad_token_id=0)
    assert out.shape == (2, 8)


# Types and devices


@each_model
@each_budget
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
    ],
    ids=str,
)
def test_dtype(name, budget, arguments, expected, family_folder, loaded):
    # Some of them through the AutoClass, which puts the dtype into the config first, the others past it.
    cls = AutoModelForCausalLM if budget is None else ElasticForCausalLM
    model = cls.from_pretrained(family_folder(name), budget=budget, **arguments)
    assert model.dtype == model.config.dtype == model.elastic_config.dtype == expected
    reference = loaded(name, budget).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, reference[key].to(tensor.dtype))
        assert tensor.dtype == (torch.float32 if key.endswith("e_score_correction_bias") else expected)


@each_model
def test_dtype_of_the_checkpoint(name, family_folder, tmp_path):
    load(family_folder(name), dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for budget in BUDGETS:
        assert load(tmp_path, budget=budget).dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_dtype_decides_what_an_amount_of_memory_buys(family_folder):
    folder = family_folder("nano3")
    costs = ElasticConfig.from_pretrained(folder).costs()
    limit = costs["full"].weight_bytes(torch.bfloat16)
    assert load(folder, budget=f"{limit / 1000}kB", dtype=torch.bfloat16).budget == "full"
    assert load(folder, budget=f"{limit / 1000}kB").budget == "small"


@each_model
@each_budget
def test_device_map_on_one_device(name, budget, family_folder, loaded, ids):
    model = load(family_folder(name), budget=budget, device_map={"": "cpu"})
    assert_same_weights(model, loaded(name, budget))
    assert_same_logits(logits(model, ids), logits(loaded(name, budget), ids))


@each_model
@each_budget
def test_disk_offload(name, budget, family_folder, loaded, tmp_path, ids):
    expected = loaded(name, budget)
    depth = expected.config.num_hidden_layers
    assert depth >= 3
    parts = {module: "cpu" for module, _ in expected.named_children() if module != "model"}
    parts |= {f"model.{module}": "cpu" for module, _ in expected.model.named_children() if module != "layers"}
    parts |= {f"model.layers.{i}": "disk" if i % 2 == 0 else "cpu" for i in range(depth)}
    model = load(family_folder(name), budget=budget, device_map=parts, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert_same_logits(logits(model, ids), logits(expected, ids))
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids[:, :5], **settings), expected.generate(ids[:, :5], **settings))


@each_model
def test_an_offloaded_slice_can_be_saved(name, family_folder, loaded, tmp_path):
    expected = loaded(name, "small")
    parts = {"model": "cpu", "lm_head": "cpu", "model.layers.0": "disk"}
    parts |= {f"model.layers.{i}": "cpu" for i in range(1, expected.config.num_hidden_layers)}
    parts |= {f"model.{module}": "cpu" for module, _ in expected.model.named_children() if module != "layers"}
    del parts["model"]
    model = load(family_folder(name), budget="small", device_map=parts, offload_folder=tmp_path / "offload")
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "saved")
    assert_same_weights(load(tmp_path / "saved"), expected)


# Saving


@each_model
@each_budget
def test_sharded(name, budget, loaded, tmp_path):
    model = loaded(name, budget)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = load(tmp_path)
    assert_same_weights(again, model)
    assert list(again.budgets) == list(model.budgets)
    assert_same_weights(load(tmp_path, budget="small"), loaded(name, "small"))


@each_model
def test_saving_one_budget_of_the_family(name, family_folder, loaded, tmp_path):
    family = load(family_folder(name))
    family.save_pretrained(tmp_path, budget="medium")
    assert family.budget == "full"
    again = load(tmp_path)
    assert list(again.budgets) == ["medium", "small"]
    assert_same_weights(again, loaded(name, "medium"))


@each_model
def test_the_saved_config(name, loaded, family_folder, tmp_path):
    loaded(name).save_pretrained(tmp_path)
    saved, first = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, family_folder(name)))
    assert saved["model_type"] == "elastic"
    assert saved["architectures"] == ["ElasticForCausalLM"]
    assert saved["elastic"] == first["elastic"]
    assert saved["parent_config"]["architectures"] == first["parent_config"]["architectures"]


@each_model
def test_a_checkpoint_without_the_experts_split(name, loaded, tmp_path):
    """`save_original_format=False` writes one tensor for all experts, under the names of the live model."""
    loaded(name).save_pretrained(tmp_path, save_original_format=False)
    assert_same_weights(load(tmp_path), loaded(name))
    assert_same_weights(load(tmp_path, budget="small"), loaded(name, "small"))


@each_model
def test_variant(name, loaded, tmp_path):
    loaded(name).save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list(tmp_path.glob("model.fp16-*.safetensors"))) > 1
    with pytest.raises(OSError, match="neither"):
        load(tmp_path)
    assert_same_weights(load(tmp_path, variant="fp16", budget="small"), loaded(name, "small"))
    loaded(name, "small").save_pretrained(tmp_path / "single", variant="fp16")
    assert_same_weights(load(tmp_path / "single", variant="fp16"), loaded(name, "small"))


@each_model
def test_subfolder(name, family_folder, loaded, tmp_path):
    shutil.copytree(family_folder(name), tmp_path / "nested")
    assert_same_weights(load(tmp_path, subfolder="nested", budget="small"), loaded(name, "small"))
    assert_same_weights(ElasticForCausalLM.from_pretrained(tmp_path, subfolder="nested"), loaded(name))


@each_model
def test_generation_config_is_kept(name, own_folder, tmp_path, ids):
    folder = own_folder(name)
    GenerationConfig(max_new_tokens=3, pad_token_id=0).save_pretrained(folder)
    for budget in BUDGETS:
        model = load(folder, budget=budget)
        assert model.generation_config.max_new_tokens == 3
        assert model.generate(ids[:, :4]).shape == (2, 7)
        for method in ("save_pretrained", "export"):
            out = tmp_path / f"{budget}-{method}"
            getattr(model, method)(out, **({"heterogeneous": True} if method == "export" else {}))
            assert GenerationConfig.from_pretrained(out).max_new_tokens == 3


@each_model
def test_the_tokenizer_comes_along(name, with_tokenizer, tokenizer, tmp_path):
    folder = with_tokenizer(name)
    model = load(folder, budget="small")
    model.export(tmp_path / "beside")
    model.export(tmp_path / "given", tokenizer=tokenizer)
    for out in ("beside", "given"):
        again = PreTrainedTokenizerFast.from_pretrained(tmp_path / out)
        assert again("t5 t7").input_ids == [5, 7]


@each_model
@pytest.mark.parametrize("budget", BUDGETS)
def test_pipeline(name, budget, with_tokenizer, loaded, caplog):
    folder = with_tokenizer(name)
    pipe = pipeline("text-generation", model=str(folder), model_kwargs={"budget": budget})
    assert "not supported" not in caplog.text
    assert pipe.model.num_parameters() == loaded(name, budget).num_parameters()
    out = pipe("t5 t7 t9", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    expected = loaded(name, budget).generate(
        torch.tensor([[5, 7, 9]]), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert out.split() == [f"t{i}" for i in expected[0, 3:].tolist()]


def test_pipeline_with_a_loaded_family(with_tokenizer, tokenizer):
    model = load(with_tokenizer("nano3"))
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with model.at("small"):
        small = pipe("t5 t7", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert small != pipe("t5 t7", max_new_tokens=6, do_sample=False)[0]["generated_text"]


@pytest.fixture
def hub_cache(with_tokenizer, tmp_path):
    """A Hub cache that holds `someone/nano3`, as a download leaves it."""
    commit, repo = "a" * 40, tmp_path / "cache" / "models--someone--nano3"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(with_tokenizer("nano3"), repo / "snapshots" / commit)
    return tmp_path / "cache"


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_from_the_hub(max_shard_size, hub_cache, loaded, tmp_path):
    loaded("nano3").save_pretrained(next(hub_cache.glob("*/snapshots/*")), max_shard_size=max_shard_size)
    hub = {"cache_dir": hub_cache, "local_files_only": True}
    for budget in BUDGETS:
        assert_same_weights(
            ElasticForCausalLM.from_pretrained("someone/nano3", budget=budget, **hub), loaded("nano3", budget)
        )
    small = ElasticForCausalLM.from_pretrained("someone/nano3", budget="small", **hub)
    assert small.name_or_path == "someone/nano3"
    small.export(tmp_path / "export")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "export")("t5 t7").input_ids == [5, 7]


def test_the_tokenizer_of_a_subfolder_comes_along(with_tokenizer, tmp_path):
    shutil.copytree(with_tokenizer("nano3"), tmp_path / "repo" / "nested")
    load(tmp_path / "repo", subfolder="nested", budget="small").export(tmp_path / "export")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "export")("t5 t7").input_ids == [5, 7]


@each_model
def test_a_state_dict_to_save(name, family_folder, loaded, tmp_path):
    """As trainers give it."""
    model = load(family_folder(name))
    doubled = {key: tensor * 2 for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    assert_same_weights(load(tmp_path), doubled)
    model.set_budget("small")
    with pytest.raises(OSError, match=r"state_dict= does not hold what is saved.*set_budget\(None\)"):
        model.save_pretrained(tmp_path / "wrong", state_dict=model.state_dict())
    assert not (tmp_path / "wrong").exists()
    model.save_pretrained(tmp_path / "small", state_dict=model.state_dict(), budget="small")
    assert_same_weights(load(tmp_path / "small"), loaded(name, "small"))


def test_only_the_main_process_writes(loaded, tmp_path):
    loaded("nano3").save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_pushing_is_saving_and_uploading(loaded, tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr(
        "hf_elastic.hub.pushing.PushMixin.push_to_hub", lambda self, repo, **kwargs: pushed.update({repo: kwargs})
    )
    loaded("nano3").save_pretrained(tmp_path, push_to_hub=True, repo_id="me/tiny", commit_message="first", token="x")
    assert pushed["me/tiny"] == {"layout": "nested", "commit_message": "first", "token": "x"}
    assert (tmp_path / "config.json").exists()
    with pytest.raises(ValueError, match="pushes everything that is loaded, not budget='small'"):
        loaded("nano3").save_pretrained(tmp_path / "small", push_to_hub=True, budget="small")
    assert not (tmp_path / "small").exists()


# Settings


@each_model
@each_budget
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation(name, budget, implementation, family_folder, loaded, ids):
    cls = ElasticForCausalLM if budget is None else AutoModelForCausalLM
    model = cls.from_pretrained(family_folder(name), budget=budget, attn_implementation=implementation)
    modules = [module for module in model.modules() if hasattr(module, "o_proj")]
    assert modules
    assert {module.config._attn_implementation for module in modules} == {implementation}
    assert_same_logits(logits(model, ids), logits(loaded(name, budget), ids))
    other = {"eager": "sdpa", "sdpa": "eager"}[implementation]
    model.set_attn_implementation(other)
    assert {module.config._attn_implementation for module in modules} == {other}


@each_model
@each_budget
def test_attention_weights_of_the_eager_implementation(name, budget, family_folder, ids):
    model = load(family_folder(name), budget=budget, attn_implementation="eager")
    out = model(ids, output_attentions=True, output_hidden_states=True, use_cache=False)
    attention = [module for module in model.modules() if hasattr(module, "o_proj")]
    assert len(out.attentions) == len(attention)
    for weights, module in zip(out.attentions, attention, strict=True):
        assert weights.shape == (2, module.q_proj.out_features // module.head_dim, 19, 19)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert {states.shape[-1] for states in out.hidden_states} == {model.config.hidden_size}


@each_model
@each_budget
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_implementation(name, budget, implementation, family_folder, loaded, ids):
    model = load(family_folder(name), budget=budget, experts_implementation=implementation)
    assert model.config._experts_implementation == implementation
    assert_same_logits(logits(model, ids), logits(loaded(name, budget), ids))
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"
    assert_same_logits(logits(model, ids), logits(loaded(name, budget), ids))


@each_model
@each_budget
def test_experts_run_as_fast_as_the_stock_ones(name, budget, loaded, original):
    assert loaded(name, budget).config._experts_implementation == "grouped_mm"
    assert loaded(name, budget).config._experts_implementation == original(name).config._experts_implementation


@each_model
def test_misaligned_experts_run_eagerly_and_say_so(name, family_folder, loaded, ids, caplog):
    with caplog.at_level("WARNING"):
        model = load(family_folder(name), budget={"expert_ffn": 6})
    assert "expert widths [6] are not multiples of 4" in caplog.text
    assert "experts_implementation='eager'" in caplog.text
    assert model.config._experts_implementation == "eager"
    family = load(family_folder(name))
    family.set_budget({"expert_ffn": 6})
    assert_same_logits(logits(model, ids), logits(family, ids))
    caplog.clear()
    with caplog.at_level("WARNING"):
        load(family_folder(name), budget={"expert_ffn": 6}, experts_implementation="eager")
    assert "expert widths" not in caplog.text


@each_model
@pytest.mark.parametrize("cls", [AutoModelForCausalLM, ElasticForCausalLM])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_cache", False),
        ("initializer_range", 0.5),
        ("max_position_embeddings", 77),
        ("output_hidden_states", True),
        ("output_router_logits", True),
    ],
)
def test_fields_of_the_stock_config(name, cls, field, value, family_folder, tmp_path, ids):
    model = cls.from_pretrained(family_folder(name), budget="small", **{field: value})
    assert getattr(model.config, field) == value
    out = model(ids)
    if field == "use_cache":
        assert out.past_key_values is None
    if field == "output_hidden_states":
        assert out.hidden_states is not None
    if field == "output_router_logits":
        assert out.router_logits is not None
    if field != "output_hidden_states":
        model.save_pretrained(tmp_path)
        assert getattr(load(tmp_path).config, field) == value


def test_output_attentions_argument(family_folder, ids):
    for cls in (AutoModelForCausalLM, ElasticForCausalLM):
        model = cls.from_pretrained(
            family_folder("nano3"), budget="small", output_attentions=True, attn_implementation="eager"
        )
        assert model(ids).attentions


def test_fields_apply_to_every_budget_of_a_family(family_folder, ids):
    family = load(family_folder("nano3"), use_cache=False)
    for budget in ("small", "medium", None):
        family.set_budget(budget)
        assert family(ids).past_key_values is None


def test_a_config_of_ones_own(family_folder, loaded):
    config = AutoConfig.from_pretrained(family_folder("nano3"))
    config.parent_config.use_cache = False
    model = load(family_folder("nano3"), config=config, budget="small")
    assert model.config.use_cache is False
    assert_same_weights(model, loaded("nano3", "small"))
    assert config.parent_config.hidden_size == 48, "the user's config was changed"
    by_path = load(family_folder("nano3"), config=family_folder("nano3") / "config.json", budget="small")
    assert_same_weights(by_path, loaded("nano3", "small"))


# Training


@each_model
@each_budget
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(name, budget, reentrant, family_folder, ids):
    model = load(family_folder(name), budget=budget).train()

    def gradients():
        with torch.enable_grad():
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    without = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with_checkpointing = gradients()
    assert without.keys() == with_checkpointing.keys()
    assert len(without) >= len(dict(model.named_parameters())) - 1
    assert all(torch.equal(without[key], with_checkpointing[key]) for key in without)


@each_model
@each_budget
def test_one_training_step_lowers_the_loss(name, budget, family_folder, ids):
    model = load(family_folder(name), budget=budget).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch.enable_grad():
        before = model(input_ids=ids, labels=ids).loss
        before.backward()
    optimizer.step()
    assert model(input_ids=ids, labels=ids).loss < before


# The vocabulary


@each_model
@each_budget
@pytest.mark.parametrize("size", [VOCAB + 6, VOCAB - 10])
def test_resize_token_embeddings(name, budget, size, family_folder, tmp_path, ids):
    model = load(family_folder(name), budget=budget)
    before, short = logits(model, ids % 50), min(size, VOCAB)
    model.resize_token_embeddings(size)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == size
    after = logits(model, ids % 50)
    assert after.shape[-1] == size
    assert torch.equal(after[..., :short], before[..., :short])
    for key, entry in model.budgets.items():
        with model.at(key):
            assert model.num_parameters() == entry["total_params"]
            assert logits(model, ids % 50).shape[-1] == size
    model.save_pretrained(tmp_path)
    assert_same_weights(load(tmp_path), model)
    assert load(tmp_path, budget="small").config.vocab_size == size


def test_resize_while_switched_stays_switched(family_folder, ids):
    model = load(family_folder("nano3"))
    model.set_budget({"hidden": 40})
    model.resize_token_embeddings(70)
    assert model.config.hidden_size == 40
    assert logits(model, ids).shape[-1] == 70
    model.set_budget(None)
    assert logits(model, ids).shape[-1] == 70


def test_resize_tied_embeddings(original, tmp_path):
    original("granite_tied").save_pretrained(tmp_path)
    ElasticConfig.from_parent(original("granite_tied").config, {"small": {"hidden": 24}}).save_pretrained(tmp_path)
    model = load(tmp_path)
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with model.at("small"):
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert model.lm_head.weight.shape == (70, 24)


# Copies


@each_model
@each_budget
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(name, budget, how, loaded, ids):
    model = loaded(name, budget)
    twin = how(model)
    assert type(twin) is type(model)
    assert twin.budget == model.budget
    assert_same_weights(twin, model)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not theirs & {p.data_ptr() for p in twin.parameters()}
    with twin.at("small"):
        assert twin.budget == "small"


# Without weights


@each_model
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_from_config(name, dtype, family_folder, ids):
    config = AutoConfig.from_pretrained(family_folder(name))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    assert isinstance(model, ElasticForCausalLM)
    assert model.dtype == (dtype or torch.float32)
    assert model.config._attn_implementation == "eager"
    assert list(model.budgets) == ["large", "medium", "small"]
    model.eval()
    with model.at("small"):
        assert torch.isfinite(logits(model, ids)).all()
    base = AutoModel.from_config(config)
    assert isinstance(base, ElasticModel)


@each_model
def test_from_config_then_saved(name, family_folder, tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(family_folder(name))).eval()
    model.save_pretrained(tmp_path)
    assert_same_weights(load(tmp_path), model)
    assert list(load(tmp_path).budgets) == ["large", "medium", "small"]


@each_model
def test_a_heterogeneous_config_initialises_every_size(name, family_folder, loaded, ids):
    """Stock initialisation reads sizes off the global config; those of the other layers have to be right as well."""
    config = loaded(name, "medium").elastic_config
    assert config.parent_config.is_heterogeneous
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    shapes = {key: tensor.shape for key, tensor in loaded(name, "medium").state_dict().items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes
    assert torch.isfinite(logits(model, ids)).all()
    for key, tensor in model.state_dict().items():
        if key.endswith("A_log"):
            torch.testing.assert_close(tensor, torch.log(torch.arange(1.0, len(tensor) + 1)))
        elif key.endswith((".experts.up_proj", ".experts.gate_up_proj", "q_proj.weight")):
            assert 0.01 < tensor.std() < 0.03, key  # initializer_range is 0.02


@each_model
def test_the_class_makes_itself_from_a_config(name, family_folder):
    config = AutoConfig.from_pretrained(family_folder(name))
    model = ElasticForCausalLM(config)
    assert type(model).__name__.startswith("Elastic")
    assert list(model.budgets) == ["large", "medium", "small"]


@each_model
def test_a_state_dict_in_memory(name, original, family_folder):
    config = AutoConfig.from_pretrained(family_folder(name))
    state = original(name).state_dict()
    model, info = ElasticForCausalLM.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(model, original(name))
    assert list(model.budgets) == ["large", "medium", "small"]


@each_model
def test_seldom_used_arguments_are_taken(name, family_folder, loaded):
    model = load(
        family_folder(name),
        budget="small",
        low_cpu_mem_usage=True,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        revision="main",
        token=None,
        cache_dir=None,
        force_download=False,
    )
    assert_same_weights(model, loaded(name, "small"))


@each_model
def test_the_stock_helpers(name, loaded):
    model = loaded(name, "small")
    assert model.get_input_embeddings().weight.shape == (VOCAB, model.config.hidden_size)
    assert model.get_output_embeddings().weight.shape == (VOCAB, model.config.hidden_size)
    assert model.get_memory_footprint() >= model.elastic_config.costs()["small"].weight_bytes(torch.float32)
    assert model.base_model is model.model
    assert model.name_or_path
    assert model.can_generate()
    assert type(model).__name__ in repr(model)


def test_only_the_slice_is_allocated(original, family_folder, monkeypatch):
    """No tensor of the parent's size is made on the way."""
    config = original("nano3").config
    parent_elements = max(p.numel() for p in original("nano3").parameters())
    made = []
    real = torch.empty

    def record(*args, **kwargs):
        out = real(*args, **kwargs)
        if not out.is_meta:
            made.append(out.numel())
        return out

    monkeypatch.setattr(torch, "empty", record)
    load(family_folder("nano3"), budget="small")
    assert all(size < parent_elements for size in made)
    assert get_architecture(config.model_type).depth(config) == 8


@each_model
@each_budget
def test_weights_lie_on_cache_lines_and_no_longer_in_the_files(name, budget, own_folder):
    """A mapped file would have them off cache lines, and whatever is written to it would be in the model."""
    folder = own_folder(name)
    starts = shift_off_cache_lines(folder)
    assert any(start % 64 for start in starts)
    model = load(folder, budget=budget)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.write(b"\xff" * file.stat().st_size)
    assert_same_weights(model.state_dict(), before)
    assert not any(tensor.data_ptr() % 64 for tensor in model.state_dict().values())


def shift_off_cache_lines(folder):
    """Pad the headers of the files so that the first tensor starts off a cache line; returns where the tensors start."""
    starts = []
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:end])
        header = data[8:end] + b" " * ((40 - end) % 64)
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
        starts += [
            8 + len(header) + entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"
        ]
    return starts


def test_parents_of_other_seeds_differ():
    """The random parents are random: two seeds share no weight, so equality in these tests means something."""
    first, second = build_parent("nano2", 0).state_dict(), build_parent("nano2", 1).state_dict()
    assert not any(torch.equal(first[key], second[key]) for key in first)
