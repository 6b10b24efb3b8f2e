"""Stock models that the package loads or is given are whole: nothing in them is random, left out, or not there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BUDGETS, CONFIGS, VOCAB, build_parent
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, NemotronHForCausalLM

from hf_elastic import CheckpointError, ElasticConfigError, ElasticForCausalLM, elastify, score
from hf_elastic.checkpoints.loading import load_stock
from hf_elastic.cli import main
from hf_elastic.trainers import ElasticDistillationConfig, ElasticDistillationTrainer

Weights = dict[str, torch.Tensor]
LAYER = "backbone.layers.3."
EXPERT = f"{LAYER}mixer.experts."


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: tensor for key, tensor in weights.items() if not any(part in key for part in parts)}


def renamed(before: str, now: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key.replace(before, now): tensor for key, tensor in weights.items()}


DAMAGES: dict[str, Callable[[Weights], Weights]] = {
    "missing": without(f"{LAYER}norm."),
    "renamed": renamed("layers.2.mixer.q_proj", "layers.2.mixer.query"),
    "no_head": without("lm_head"),
    "no_layer": without("layers.7."),
    "a_layer_more": lambda weights: weights | {"backbone.layers.8.norm.weight": torch.ones(48)},
    "wrong_shape": lambda weights: weights | {"backbone.norm_f.weight": torch.ones(40)},
    "no_expert": without(f"{EXPERT}5."),
    "another_expert": renamed(f"{EXPERT}5.", f"{EXPERT}12."),  # the stock loader stacks what is there, in order
}


def damaged(folder: Path, damage: Callable[[Weights], Weights]) -> Path:
    build_parent("nano3").save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(damage(load_file(file)), file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_parent_that_is_not_whole(damage, tmp_path, capsys):
    folder, out = damaged(tmp_path / "parent", DAMAGES[damage]), tmp_path / "out"
    with pytest.raises(CheckpointError, match="do not fit the config"):
        elastify(folder, budgets={"small": {"hidden": 32}}, sort=False)
    code = main(["elastify", str(folder), str(out), "--no-sort", "--budget", "small:hidden=32"])
    assert code != 0
    assert "do not fit the config" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_teacher_that_is_not_whole(damage, tmp_path):
    folder = damaged(tmp_path / "parent", DAMAGES[damage])
    model = elastify(build_parent("nano3"), budgets=BUDGETS["nano3"], sort=False)
    config = ElasticDistillationConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_list([{"input_ids": [2, 3, 4]}])
    for teacher in (str(folder), folder):
        with pytest.raises(CheckpointError, match="do not fit the config"):
            ElasticDistillationTrainer(model, teacher_model=teacher, args=config, train_dataset=rows)


@pytest.mark.parametrize("damage", ["missing", "renamed", "no_head", "a_layer_more", "wrong_shape"])
def test_what_only_the_stock_loader_sees(damage, tmp_path):
    """Of architectures without a table, and of files that are not safetensors."""
    folder = damaged(tmp_path, DAMAGES[damage])
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="_keys|other shapes"):
        load_stock(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_parent(name, tmp_path, original):
    original(name).save_pretrained(tmp_path)
    loaded = load_stock(tmp_path)
    for key, tensor in original(name).state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)


@pytest.mark.parametrize("nothing", ["backbone.layers.0.rotary_emb.inv_freq", "mtp.layers.0.norm.weight"])
def test_tensors_that_may_be_there(nothing, tmp_path):
    load_stock(damaged(tmp_path, lambda weights: weights | {nothing: torch.ones(4)}))


@pytest.mark.parametrize("prefix", ["backbone.", "model."])
def test_old_spellings_are_read(prefix, tmp_path, original, ids):
    folder = damaged(
        tmp_path,
        lambda weights: renamed("backbone.", prefix)(renamed("embeddings.weight", "embedding.weight")(weights)),
    )
    family = elastify(folder, budgets=BUDGETS["nano3"], sort=False)
    assert torch.equal(family.get_input_embeddings().weight, original("nano3").get_input_embeddings().weight)
    family.save_pretrained(tmp_path / "saved")
    assert "backbone.embeddings.weight" in load_file(tmp_path / "saved" / "model.safetensors")
    small = ElasticForCausalLM.from_pretrained(folder, elastic_config=BUDGETS["nano3"], budget="small")
    family.set_budget("small")
    torch.testing.assert_close(small(ids).logits, family(ids).logits, rtol=0, atol=1e-5)  # products in another order


# -- parents that are given ---------------------------------------------------------------------------------------------


def rows(count: int = 6, length: int = 9) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(5))


def scored(parent: Any, calibration: Any, **options: Any) -> dict[str, Any]:
    return score(parent, calibration, progress=False, **options).values


def test_a_parent_in_files_is_refused_before_it_is_scored(tmp_path, monkeypatch):
    build_parent("nano3").save_pretrained(tmp_path)
    places = {"model.embeddings": "cpu", "model.norm_f": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(8)}
    parent = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    calibration = [{"input_ids": row} for row in rows()]
    monkeypatch.setattr(NemotronHForCausalLM, "forward", lambda *_, **__: pytest.fail("it was scored"))
    for run in (
        lambda: elastify(parent, calibration, budgets={"small": {"hidden": 32}}, progress=False),
        lambda: elastify(parent, budgets={"small": {"hidden": 32}}, sort=False),
        lambda: score(parent, calibration, progress=False),
    ):
        with pytest.raises(ElasticConfigError, match="have no storage.*device_map"):
            run()


def test_a_compiled_parent_is_the_parent(parent):
    plain = parent("nano3")
    made = elastify(
        torch.compile(plain), [{"input_ids": row} for row in rows()], budgets=BUDGETS["nano3"], progress=False
    )
    wanted = elastify(plain, [{"input_ids": row} for row in rows()], budgets=BUDGETS["nano3"], progress=False)
    assert all(torch.equal(made.state_dict()[key], tensor) for key, tensor in wanted.state_dict().items())


def test_wrapped_parents_are_refused(parent):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    adapted, attached = get_peft_model(parent("nano3"), lora), parent("nano3")
    attached.add_adapter(copy.deepcopy(lora))
    for wrapped, message in (
        (adapted, "merge_and_unload"),
        (attached, "merge_and_unload"),
        (nn.DataParallel(parent("nano3")), "not DataParallel"),
        (None, "not NoneType"),
    ):
        with pytest.raises(ElasticConfigError, match=message):
            elastify(wrapped, budgets={"small": {"hidden": 32}}, sort=False)
        with pytest.raises(ElasticConfigError, match=message):
            score(wrapped, rows(), progress=False)
    assert elastify(adapted.merge_and_unload(), budgets={"small": {"hidden": 32}}, sort=False)


# -- calibration --------------------------------------------------------------------------------------------------------


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[axis][layer], other[axis][layer]) for axis in one for layer in one[axis])


def test_batches_and_tensors_are_their_rows(original):
    ids = rows()
    ids[4:] = ids[:2]
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[3, :2] = 0
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()}).with_format("torch")
    wanted = scored(original("nano3"), list(data.with_format(None)), batch_size=3)
    for calibration in (DataLoader(data, batch_size=2), [{"input_ids": ids, "attention_mask": mask}]):
        assert equal(scored(original("nano3"), calibration, batch_size=3), wanted)
    wanted = scored(original("nano3"), [{"input_ids": row} for row in ids[:5]])
    for calibration in (ids, [ids[:2], ids[2:]], DataLoader(ids, batch_size=2)):
        assert equal(scored(original("nano3"), calibration, samples=5), wanted)


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": torch.ones(2, 2, 2, dtype=torch.int64)},
        {"input_ids": torch.tensor(3)},
        {"input_ids": [[1, 2], [3]]},
        {"input_ids": [torch.tensor([1, 2]), torch.tensor([3, 4])]},  # how a DataLoader puts lists together
        {"input_ids": [0.5, 1.0]},
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1]},
        {"input_ids": [3, -100]},
        [1, 2, 3],
    ],
    ids=str,
)
def test_rows_that_cannot_be_read(row, original):
    with pytest.raises(ElasticConfigError, match="calibration"):
        score(original("nano3"), [row], progress=False)


def test_scores_that_are_not_finite(parent):
    broken = parent("nano3")
    broken.model.layers[4].mixer.D.fill_(float("nan"))
    with pytest.raises(ElasticConfigError, match="not finite"):
        score(broken, rows(), progress=False)
