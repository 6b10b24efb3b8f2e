"""Which sizes other programs cannot run: what the tables say, who is told, and keeping to those that all can run."""

from __future__ import annotations

import json
import warnings
from fractions import Fraction

import pytest
import torch
from cases import VOCAB, granite, nemotron, randomize
from compare import assert_same_logits, logits
from transformers import AutoModelForCausalLM, BambaConfig, FalconH1Config

from hf_elastic import ElasticConfig, ElasticConfigError, ElasticForCausalLM, PortabilityWarning, elastify
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.cost import CostModel
from hf_elastic.architectures.obstacles import REFUSES, SILENT, Obstacle
from hf_elastic.architectures.portability import portability, words
from hf_elastic.cli import main
from hf_elastic.commands.plan import plan
from hf_elastic.configuration.budgets import Limit
from hf_elastic.elastification.search import BudgetSearch

ROPE = {"position_embedding_type": "rope"}


def hybrid(**fields):
    """As published Granite hybrids are: heads * head_dim = hidden, twice that inside Mamba, no positions."""
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "position_embedding_type": "nope",
        "layer_types": kinds,
        "num_hidden_layers": 3,
    }
    return granite(**{**sizes, **fields})


def attention_only(**fields):
    kinds = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
    return hybrid(**{**kinds, "num_local_experts": 0, "num_experts_per_tok": 0, **fields})


def nano(pattern="M-*", **fields):
    return nemotron(pattern, **{"mamba_num_heads": 16, "mamba_head_dim": 8, "n_groups": 2, **fields})


def bamba(**fields):
    """As published: heads * head_dim = hidden, twice that inside Mamba."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 6,
    }
    return BambaConfig(**{**sizes, **fields})


def falcon_h1():
    fields = {"num_attention_heads": 8, "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_ssm": 128}
    return FalconH1Config(hidden_size=64, intermediate_size=40, num_hidden_layers=2, mamba_d_state=6, **fields)


ALL_BAMBA = ["SGLang", "llama.cpp", "vLLM"]
ALL_GRANITE = ["SGLang", "llama.cpp", "mistral.rs", "vLLM"]
ONE_SHARE = {"hidden": 32, "attention_heads": 4, "mamba_heads": 4}
SIZES = {
    "granite": (hybrid, {}, torch.float32, [], []),
    "one share": (hybrid, ONE_SHARE, torch.float32, [], []),
    "hidden alone": (hybrid, {"hidden": 32}, torch.float32, ALL_GRANITE, ["vLLM"]),
    "heads alone": (hybrid, {"attention_heads": 4}, torch.float32, ALL_GRANITE, []),
    "hidden and heads": (hybrid, {"hidden": 32, "attention_heads": 4}, torch.float32, ["llama.cpp"], []),
    "Mamba alone": (hybrid, {"mamba_head_dim": 8}, torch.float32, ["llama.cpp"], []),
    "Mamba inside": (hybrid, {"mamba_heads": 4, "mamba_head_dim": 16, "hidden": 32}, torch.float32, ALL_GRANITE, ["vLLM"]),
    "no Mamba left": (hybrid, {"layers": [1]}, torch.float32, ["llama.cpp", "mistral.rs"], ["llama.cpp"]),
    "no attention left": (lambda: hybrid(layer_types=["linear_attention"] * 3), {}, torch.float32, [], []),
    "positions and Mamba": (lambda: hybrid(**ROPE), {}, torch.float32, ["llama.cpp"], ["llama.cpp"]),
    "as granite-4.0-350m": (lambda: attention_only(**ROPE), {}, torch.float32, ["mistral.rs"], []),
    "attention only, hidden": (lambda: attention_only(**ROPE), {"hidden": 40}, torch.float32, ALL_GRANITE, ["vLLM"]),
    "a head_dim of its own": (lambda: attention_only(**ROPE, head_dim=4), {}, torch.float32, ALL_GRANITE, []),
    "wide experts": (hybrid, {"expert_ffn": 12}, torch.float32, [], []),
    "odd experts": (hybrid, {"expert_ffn": 6}, torch.float32, ["plain transformers"], []),
    "experts in bfloat16": (hybrid, {"expert_ffn": 12}, torch.bfloat16, ["plain transformers"], []),
    "dense": (lambda: attention_only(**ROPE), {"shared_expert_ffn": 7}, torch.bfloat16, ["mistral.rs"], []),
    "bamba": (bamba, {}, torch.float32, [], []),
    "bamba, one share": (bamba, {**ONE_SHARE, "ffn": 20}, torch.float32, [], []),
    "bamba, hidden alone": (bamba, {"hidden": 32}, torch.float32, ALL_BAMBA, ["vLLM"]),
    "bamba, heads alone": (bamba, {"attention_heads": 4}, torch.float32, ALL_BAMBA, []),
    "bamba, Mamba alone": (bamba, {"mamba_head_dim": 8}, torch.float32, ["llama.cpp"], []),
    "bamba, no Mamba left": (bamba, {"layers": [1], "hidden": 32, "attention_heads": 4}, torch.float32, [], []),
    "falcon_h1": (falcon_h1, {"hidden": 40, "attention_heads": 4, "mamba_heads": 6}, torch.float32, [], []),
    "nemotron_h": (nano, {}, torch.float32, [], []),
    "nemotron_h, any hidden": (nano, {"hidden": 20, "attention_heads": 2, "ffn": 7}, torch.float32, [], []),
    "nemotron_h, Mamba 96": (nano, {"mamba_heads": 12}, torch.float32, ["llama.cpp"], []),
    "nemotron_h, Mamba 64": (nano, {"mamba_heads": 8}, torch.float32, [], []),
    "nemotron_h, Mamba of other heads": (nano, {"mamba_head_dim": 4}, torch.float32, [], []),
    "nemotron_h, MLP and experts": (lambda: nano("ME-*"), {}, torch.float32, ["llama.cpp"], []),
    "nemotron_h, MLP dropped": (lambda: nano("ME-*"), {"layers": [0, 1, 3]}, torch.float32, [], []),
    "nemotron_h, hidden experts read": (lambda: nano("ME*"), {"hidden": 42}, torch.float32, ["plain transformers"], []),
    "nemotron_h, latent experts": (
        lambda: nano("ME*", moe_latent_size=20), {"hidden": 42}, torch.float32, [], []
    ),
    "layers of their own": (nano, {"ffn": 20, "layers": [0, 1, 2]}, torch.float32, [], []),
    "per layer": (lambda: nano("M-*-"), {"ffn": {1: 20}}, torch.float32, ["every program without hf_elastic"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_the_tables_know_what_other_programs_do(name):
    make, sizes, dtype, programs, silent = SIZES[name]
    config = make()
    table = get_architecture(config.model_type)
    found = portability(table, config, table.submodel(config, sizes), dtype)
    assert sorted({obstacle.program for obstacle in found}) == programs
    assert sorted({obstacle.program for obstacle in found if obstacle.does == SILENT}) == silent
    # the slice, whose sizes are all there is, is judged as the size of its parent
    config = table.config_for(config, table.submodel(config, sizes))
    again = portability(table, config, table.full(config), dtype)
    assert {obstacle[:2] for obstacle in again} == {obstacle[:2] for obstacle in found}


def family_of(config, budgets, dtype=torch.float32):
    parent = AutoModelForCausalLM.from_config(config).eval()
    randomize(parent)
    elastic = ElasticConfig.from_parent(config, budgets)
    return ElasticForCausalLM.from_pretrained(
        None, config=elastic, state_dict=parent.to(dtype).state_dict(), dtype=dtype
    )


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 6), (torch.bfloat16, 12)])
def test_plain_transformers_does_what_the_warning_says(dtype, width, tmp_path, ids):
    family = family_of(
        hybrid(), {"odd": {"expert_ffn": width}, "even": {"expert_ffn": 16 // dtype.itemsize, **ONE_SHARE}}, dtype
    )
    with pytest.warns(PortabilityWarning, match=rf"size 'odd'.*plain transformers raises.*\[{width}\].*eager"):
        family.export(tmp_path / "odd", "odd")
    odd = AutoModelForCausalLM.from_pretrained(tmp_path / "odd", dtype=dtype)
    with pytest.raises(RuntimeError, match="strides|multiple"):
        odd(ids)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "odd", dtype=dtype, experts_implementation="eager")
    assert eager(ids).logits.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family.export(tmp_path / "even", "even")
    even = AutoModelForCausalLM.from_pretrained(tmp_path / "even", dtype=dtype)
    if dtype == torch.float32:
        with family.at("even"):
            assert_same_logits(logits(even, ids), logits(family, ids))
    else:
        assert even(ids).logits.isfinite().all()


def test_who_is_warned(tmp_path):
    """The line of the user, by the name of the size and of the program; not who saves a whole family in the stock layout."""
    family = family_of(hybrid(), {"good": ONE_SHARE, "bad": {**ONE_SHARE, "hidden": 16}})
    told = r"size 'bad' is not for every program: vLLM computes wrong results without an error \(.*16 / 4"
    with pytest.warns(PortabilityWarning, match=told) as caught:
        family.export(tmp_path / "export", "bad")
    assert [w.filename for w in caught] == [__file__]
    with pytest.warns(
        PortabilityWarning, match="budgets/bad, which other programs read, is not for every program: vLLM"
    ):
        family.save_pretrained(tmp_path / "nested", layout="nested")
    with pytest.warns(PortabilityWarning, match=told):
        family.save_pretrained(tmp_path / "slice", budget="bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family.save_pretrained(tmp_path / "family")
        family.export(tmp_path / "good", "good")
        family.save_pretrained(tmp_path / "good slice", budget="good")
        again = ElasticForCausalLM.from_pretrained(tmp_path / "slice")
    with pytest.warns(PortabilityWarning, match=told):
        again.export(tmp_path / "again")
    with pytest.warns(PortabilityWarning, match=told):
        again.save_pretrained(tmp_path / "saved again")


def test_plan_and_export_tell(tmp_path, capsys):
    family = family_of(hybrid(), {"good": ONE_SHARE, "bad": {**ONE_SHARE, "hidden": 16}})
    family.save_pretrained(tmp_path / "family")
    entries = {entry["name"]: entry["obstacles"] for entry in plan(str(tmp_path / "family"), {"expert_ffn": 6})}
    assert entries["full"] == entries["good"] == []
    assert [o["program"] for o in entries["custom"]] == ["plain transformers"]
    assert entries["bad"][0] == {
        "program": "vLLM",
        "does": SILENT,
        "why": "it takes hidden / attention_heads = 16 / 4 for the width of a head, which is 8",
    }
    assert main(["plan", str(tmp_path / "family")]) == 0
    text = capsys.readouterr().out
    assert "exported, bad: vLLM computes wrong results without an error (" in text
    assert "good:" not in text
    assert main(["plan", str(tmp_path / "family"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budgets"][2]["obstacles"] == entries["bad"]
    for budget, expected in (("bad", True), ("good", False)):
        assert main(["export", str(tmp_path / "family"), str(tmp_path / budget), "--budget", budget]) == 0
        assert ("not for every program: vLLM" in capsys.readouterr().out) == expected


def test_push_tells(tmp_path, capsys, monkeypatch):
    """Of a family, a slice and an export, whatever has to be written for it, as `plan` and `export` do."""
    monkeypatch.setattr("hf_elastic.hub.publishing._readme_of", lambda *_: None)
    family = family_of(hybrid(), {"good": ONE_SHARE, "bad": {**ONE_SHARE, "hidden": 16}})
    family.save_pretrained(tmp_path / "family")
    for budget in ("good", "bad"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PortabilityWarning)
            family.export(tmp_path / budget, budget)
    capsys.readouterr()
    told = {
        ("family",): "exported, bad: vLLM",
        ("family", "--layout", "stock"): "exported, bad: vLLM",
        ("family", "--budget", "bad"): "exported, bad: vLLM",
        ("family", "--budget", "good"): "exported, bad: vLLM",  # which it nests
        ("bad",): "not for every program: vLLM",
        ("good",): None,
    }
    for (source, *more), text in told.items():
        assert main(["push", str(tmp_path / source), "me/x", *more]) == 0
        table = capsys.readouterr().out.partition("README.md is")[
            0
        ]  # the card, which comes last, has words of its own
        assert ("vLLM computes wrong results without an error (" in table) == (text is not None), more
        assert text is None or text in table


def test_obstacles_in_plain_words():
    refuses = [Obstacle(program, REFUSES, "a") for program in ("llama.cpp", "SGLang", "mistral.rs")]
    assert words(refuses) == "llama.cpp, SGLang, mistral.rs do not load it (a)"
    assert words(refuses[:1]) == "llama.cpp does not load it (a)"
    assert words([Obstacle(p, SILENT, "a") for p in ("x", "y")]) == "x, y compute wrong results without an error (a)"
    twice = words([*refuses, Obstacle("mistral.rs", REFUSES, "b")])
    assert twice == "llama.cpp, SGLang do not load it (a); mistral.rs does not load it (a and b)"
    config = nano("M-*-")
    table = get_architecture(config.model_type)
    layered = portability(table, config, table.submodel(config, {"ffn": {1: 20}}))
    assert words(layered) == "no program without hf_elastic loads it (ffn differs from layer to layer)"


# Keeping to portable sizes


def rows():
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(0, VOCAB, (9,), generator=generator).tolist()} for _ in range(4)]


@pytest.mark.parametrize(
    "axes", [["hidden"], ["attention_heads", "expert_ffn"], {"hidden": [64, 32, 16], "experts": None}]
)
def test_a_portable_search_cuts_granite_by_one_share(axes):
    parent = AutoModelForCausalLM.from_config(hybrid()).eval()
    randomize(parent)
    total = parent.num_parameters()
    budgets = {"large": total * 0.8, "small": str(int(total * 0.5))}
    options = {"budgets": budgets, "batch_size": 4, "progress": False}
    model = elastify(parent, rows(), axes, portable=True, **options)
    assert {entry["name"]: entry["obstacles"] for entry in plan(model.elastic_config)} == dict.fromkeys(
        ["full", *budgets], []
    )
    full, smaller = model.elastic_config.submodel("full"), 0
    for name in budgets:
        member = model.elastic_config.submodel(name)
        shares = {Fraction(member.size(axis), full.size(axis)) for axis in ONE_SHARE}
        assert len(shares) == 1
        smaller += shares != {1}
    assert smaller, "the axes were not cut at all"


def test_without_portable_the_search_takes_what_is_best():
    parent = AutoModelForCausalLM.from_config(hybrid()).eval()
    model = elastify(parent, axes=["hidden"], budgets={"small": parent.num_parameters() * 0.5}, sort=False)
    assert "vLLM" in {obstacle["program"] for obstacle in plan(model.elastic_config)[1]["obstacles"]}


def test_a_portable_search_finds_what_trying_everything_finds():
    config = nano("ME*M", n_group=1)
    table, count = get_architecture("nemotron_h"), CostModel(config)
    choices = {"hidden": [48, 46, 44], "mamba_heads": [16, 12, 8, 4], "expert_ffn": [16, 14, 8]}
    search = BudgetSearch(table, config, choices, portable=torch.float32)
    limit = Limit("total", 0.85 * count.full.total_params)
    found = search.find(limit, torch.float32)
    best = None
    for hidden in choices["hidden"]:
        for heads in choices["mamba_heads"]:
            for ffn in choices["expert_ffn"]:
                sizes = {"hidden": hidden, "mamba_heads": heads, "expert_ffn": ffn}
                fits = count(table.submodel(config, sizes)).total_params <= limit.value
                allowed = heads * 8 % 64 == 0 and hidden % 4 == 0 and ffn % 4 == 0
                worth = hidden / 48 * heads / 16 * ffn / 16
                if fits and allowed and (best is None or worth > best[0]):
                    best = worth, sizes
    assert {axis: found.size(axis) for axis in choices} == best[1]
    free = BudgetSearch(table, config, choices).find(limit, torch.float32)
    assert {axis: free.size(axis) for axis in choices} != best[1], "the limit does not tell them apart"


def test_a_portable_size_nests_in_a_larger_one_of_other_shares():
    """A given budget that not every axis is cut in: the searched one goes below it in all of them."""
    parent = AutoModelForCausalLM.from_config(hybrid()).eval()
    randomize(parent)
    model = elastify(
        parent,
        axes=["hidden"],
        budgets={"given": {"expert_ffn": 8, **ONE_SHARE}, "searched": parent.num_parameters() * 0.2},
        sort=False,
        portable=True,
    )
    searched = model.elastic_config.submodel("searched")
    assert (
        searched.size("hidden") / 64 == searched.size("attention_heads") / 8 == searched.size("mamba_heads") / 8 < 0.5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": {"half": {"hidden": 32}}}, "budget 'half' is not portable: vLLM computes wrong.*by one and the same share"),
        ({"budgets": {"half": {"expert_ffn": 6}}}, r"not portable: plain transformers raises.*widths \[6\]"),
        ({"budgets": {"half": {"expert_ffn": {0: 8}}}}, "portable: no program without hf_elastic loads it"),
        ({"budgets": {"half": {"layers": [1]}}}, "llama.cpp computes wrong results"),
        ({"axes": {"hidden": [64, 40]}, "budgets": {"half": "1k"}}, r"These go together: hidden \[64, 48, 32, 16\]; attention_heads \[8, 6, 4, 2\]"),
        ({"axes": ["hidden"]}, "portable=True needs budgets"),
    ],
)  # fmt: skip
def test_what_is_not_portable_is_refused_before_scoring(arguments, message):
    parent = AutoModelForCausalLM.from_config(hybrid()).eval()

    def never():
        raise AssertionError("it was scored")
        yield

    with pytest.raises(ElasticConfigError, match=message):
        elastify(parent, never(), portable=True, **arguments)


def test_what_the_parent_cannot_do_is_not_asked_of_its_sizes():
    """A hybrid with positions is nothing for llama.cpp at any size, so only the others count."""
    parent = AutoModelForCausalLM.from_config(hybrid(**ROPE)).eval()
    model = elastify(parent, budgets={"half": {"mamba_heads": 4}}, sort=False, portable=True)
    assert {o["program"] for o in plan(model.elastic_config)[1]["obstacles"]} == {"llama.cpp"}


def test_the_command_keeps_to_portable_sizes(tmp_path, capsys):
    parent = AutoModelForCausalLM.from_config(hybrid()).eval()
    randomize(parent)
    parent.save_pretrained(tmp_path / "parent")
    command = ["elastify", str(tmp_path / "parent"), str(tmp_path / "family"), "--no-sort", "--portable"]
    assert main([*command, "--axis", "hidden", "--budget", f"half={int(parent.num_parameters() * 0.6)}"]) == 0
    assert "hidden=32 attention_heads=4 mamba_heads=4" in capsys.readouterr().out
    assert main([*command, "--budget", "half:hidden=32"]) == 2
    assert "is not portable" in capsys.readouterr().err
