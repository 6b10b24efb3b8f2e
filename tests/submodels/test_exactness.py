"""One submodel, reached in every way there is, is one and the same model."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from cases import CASES, HOMOGENEOUS, IDS
from compare import ATOL, assert_same_logits, assert_same_weights, logits
from transformers import AutoModel, AutoModelForCausalLM

import hf_elastic
from hf_elastic import ElasticConfig
from hf_elastic.architectures import get_architecture
from hf_elastic.submodels.masking import masked_model
from hf_elastic.submodels.slicing import slice_state_dict

each_case = pytest.mark.parametrize("case", CASES, ids=IDS)
SOME = [case for case in CASES if case.name.startswith(("full", "all", "layers_without_first"))]
some_cases = pytest.mark.parametrize("case", SOME, ids=IDS)
"""For what cannot depend on the axis: every part of every parent, cut and whole."""
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def load(checkpoint):
    """The slice of a case, from disk. Tests share it and leave it as it is."""
    slices = {}

    def get(case):
        if case.id not in slices:
            slices[case.id] = AutoModelForCausalLM.from_pretrained(checkpoint(case.parent), budget=case.submodel)
        return slices[case.id]

    return get


@pytest.fixture(scope="module")
def family(checkpoint):
    """A whole parent, switchable. Tests share it and go back to everything that is loaded."""
    families = {}

    def get(case):
        if case.parent not in families:
            families[case.parent] = AutoModelForCausalLM.from_pretrained(checkpoint(case.parent))
        return families[case.parent]

    return get


@each_case
def test_slice_equals_masked_parent(case, load, original, ids):
    sliced = logits(load(case), ids)
    assert_same_logits(sliced, logits(masked_model(original(case.parent), case.submodel), ids))
    whole = logits(original(case.parent), ids)
    if case.sizes:
        assert (sliced - whole).abs().max() > 0.1, "the case cuts nothing that matters"
    else:
        assert torch.equal(sliced, whole)


@each_case
def test_slice_from_disk_equals_slice_from_memory(case, load, original):
    stock = original(case.parent)
    architecture = get_architecture(stock.config.model_type)
    from_memory = slice_state_dict(architecture, stock.config, stock.state_dict(), case.submodel)
    assert_same_weights(load(case), from_memory)


@each_case
def test_slice_equals_view(case, load, family, ids):
    sliced = load(case)
    with family(case).at(case.submodel) as view:
        assert_same_weights(view, sliced)
        assert view.config.to_diff_dict() == sliced.config.to_diff_dict()
        assert_same_logits(logits(view, ids), logits(sliced, ids))


@each_case
def test_slice_survives_saving(case, load, tmp_path, ids):
    sliced = load(case)
    sliced.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(again, sliced)
    assert again.elastic_config.elastic == sliced.elastic_config.elastic
    assert again.config.to_diff_dict() == sliced.config.to_diff_dict()
    assert_same_logits(logits(again, ids), logits(sliced, ids))


@each_case
def test_slice_of_a_slice_is_the_slice(case, load, checkpoint, tmp_path, ids):
    direct, middle = load(case), case.middle
    inner = case.submodel.within(middle.layers)
    between = AutoModelForCausalLM.from_pretrained(checkpoint(case.parent), budget=middle)
    between.save_pretrained(tmp_path)
    from_disk = AutoModelForCausalLM.from_pretrained(tmp_path, budget=inner)
    between.set_budget(inner)
    for other in (from_disk, between):
        assert_same_weights(other, direct)
        assert other.config.to_diff_dict() == direct.config.to_diff_dict()
    assert_same_logits(logits(between, ids), logits(direct, ids))


@each_case
def test_cached_generation_equals_uncached(case, load, ids):
    model = load(case)
    prompt = ids[:, :11]
    settings = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **settings)
    uncached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **settings)
    assert cached.sequences.shape[1] == prompt.shape[1] + NEW_TOKENS
    assert torch.equal(cached.sequences, uncached.sequences)
    # Upstream clamps dt from below in the scan and not in the one-token step; the random parents keep dt far above the clamp.
    for step, (left, right) in enumerate(zip(cached.logits, uncached.logits, strict=True)):
        torch.testing.assert_close(left, right, atol=ATOL, rtol=0, msg=lambda m, step=step: f"step {step}: {m}")


@some_cases
def test_base_model_is_the_trunk_of_the_causal_one(case, load, checkpoint, tmp_path, ids):
    trunk, causal = AutoModel.from_pretrained(checkpoint(case.parent), budget=case.submodel), load(case)
    prefix = "model."
    expected = {k.removeprefix(prefix): v for k, v in causal.state_dict().items() if k.startswith(prefix)}
    assert_same_weights(trunk, expected)
    states = trunk(ids, use_cache=False).last_hidden_state
    assert_same_logits(states, causal.model(ids, use_cache=False).last_hidden_state)
    trunk.save_pretrained(tmp_path)
    assert_same_weights(AutoModel.from_pretrained(tmp_path), trunk)


def test_base_model_switches(checkpoint, ids):
    case = next(c for c in CASES if c.id == "nano3-all_per_layer")
    family = AutoModel.from_pretrained(checkpoint(case.parent))
    alone = AutoModel.from_pretrained(checkpoint(case.parent), budget=case.submodel)
    with family.at(case.submodel):
        assert_same_weights(family, alone)
        assert_same_logits(
            family(ids, use_cache=False).last_hidden_state, alone(ids, use_cache=False).last_hidden_state
        )


# Exported, and loaded where this package cannot be imported

READER = textwrap.dedent(
    """
    import json, sys

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "hf_elastic":
                raise ImportError("hf_elastic must not be needed")

    sys.meta_path.insert(0, Refuse())
    sys.modules["hf_elastic"] = None

    import torch
    from transformers import AutoModelForCausalLM

    report = {}
    for folder in sys.argv[1:]:
        saved = torch.load(f"{folder}/logits.pt")
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        with torch.no_grad():
            out = model(input_ids=saved["ids"], use_cache=False).logits
        report[folder] = {
            "class": type(model).__name__,
            "left_over": {key: sorted(map(str, value)) for key, value in info.items() if value},
            "difference": (out - saved["logits"]).abs().max().item(),
            "parameters": model.num_parameters(),
        }
    print(json.dumps(report))
    """
)


@pytest.fixture(scope="module")
def read_elsewhere(load, family, tmp_path_factory, ids):
    """What another process reports that loaded the export of every homogeneous case with plain transformers."""
    folders, parameters = {}, {}
    for case in HOMOGENEOUS:
        folder, sliced = tmp_path_factory.mktemp("export"), load(case)
        family(case).export(folder, case.submodel)
        assert family(case).budget == "full", "export left another budget active"
        with torch.no_grad():
            torch.save({"ids": ids, "logits": logits(sliced, ids)}, folder / "logits.pt")
        folders[case.id], parameters[case.id] = str(folder), sliced.num_parameters()
    run = subprocess.run(
        [sys.executable, "-c", READER, *folders.values()], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    return {name: report[folder] | {"expected_parameters": parameters[name]} for name, folder in folders.items()}


@pytest.mark.parametrize("case", HOMOGENEOUS, ids=IDS)
def test_export_loads_in_plain_transformers(case, read_elsewhere, original):
    report = read_elsewhere[case.id]
    assert report["class"] == type(original(case.parent)).__name__
    assert report["left_over"] == {}
    assert report["parameters"] == report["expected_parameters"]
    assert report["difference"] <= ATOL


def test_the_other_process_really_cannot_import_the_package():
    guard = READER.partition("import torch")[0]
    run = subprocess.run(
        [sys.executable, "-c", guard + "import hf_elastic"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "ImportError" in run.stderr or "ModuleNotFoundError" in run.stderr


@pytest.mark.parametrize("case", [case for case in SOME if case in HOMOGENEOUS], ids=IDS)
def test_export_of_a_slice_is_the_export_of_the_family(case, load, family, tmp_path):
    load(case).export(tmp_path / "slice")
    family(case).export(tmp_path / "family", case.submodel)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "slice" / file).read_bytes() == (tmp_path / "family" / file).read_bytes()


@pytest.mark.parametrize("case", [c for c in CASES if c not in HOMOGENEOUS], ids=IDS)
def test_heterogeneous_export_needs_this_package(case, load, tmp_path, ids):
    sliced = load(case)
    with pytest.raises(hf_elastic.ExportError, match="differ per layer"):
        sliced.export(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    sliced.export(tmp_path / "allowed", heterogeneous=True)
    again = hf_elastic.ElasticForCausalLM.from_pretrained(tmp_path / "allowed")
    assert_same_weights(again, sliced)
    assert_same_logits(logits(again, ids), logits(sliced, ids))


def test_export_writes_what_other_readers_want(checkpoint, tmp_path):
    case = next(c for c in CASES if c.id == "nano3-all_and_layers")
    AutoModelForCausalLM.from_pretrained(checkpoint(case.parent), budget=case.submodel).export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "nemotron_h"
    assert config["architectures"] == ["NemotronHForCausalLM"]
    assert config["hybrid_override_pattern"] == "MEM-*"
    assert len(config["layers_block_type"]) == config["num_hidden_layers"] == 5
    assert config["dtype"] == "float32"
    assert "elastic" not in config


def test_full_export_is_a_config_rewrite(original, checkpoint, tmp_path):
    AutoModelForCausalLM.from_pretrained(checkpoint("nano3")).export(tmp_path / "export")
    original("nano3").save_pretrained(tmp_path / "stock")
    stored = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("export", "stock")]
    assert stored[0] == stored[1]


def test_budgets_survive_restriction(family_folder, tmp_path):
    """A loaded submodel still nests the smaller ones, also through a file."""
    medium = AutoModelForCausalLM.from_pretrained(family_folder("nano3"), budget="medium")
    assert list(medium.budgets) == ["medium", "small"]
    assert medium.budget == "medium"
    medium.save_pretrained(tmp_path)
    assert list(ElasticConfig.from_pretrained(tmp_path).budgets) == ["medium", "small"]
    direct = AutoModelForCausalLM.from_pretrained(family_folder("nano3"), budget="small")
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path, budget="small"), direct)
    with medium.at("small"):
        assert_same_weights(medium, direct)
