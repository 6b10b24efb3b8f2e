"""Trainers that know nothing of budgets train the weights that the active budget means, whatever was made first."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from cases import VOCAB
from datasets import Dataset
from runs import family, rows, tokenizer
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from hf_elastic import HFElasticError
from hf_elastic.architectures.pieces import pieces

NAMES = ["nano3", "granite"]
IDS = torch.randint(2, VOCAB, (4, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _gradients():
    with torch.enable_grad():
        yield


def weights(model):
    with torch.no_grad(), model.at(None):
        return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def steps(model, optimizer, backward=lambda loss: loss.backward()):
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


ORDERS = {
    "train, budget, optimizer": ("train", "budget", "optimizer"),
    "budget, train, optimizer": ("budget", "train", "optimizer"),
    "budget, optimizer, train": ("budget", "optimizer", "train"),
    "optimizer, budget, train": ("optimizer", "budget", "train"),
    "train, optimizer, budget": ("train", "optimizer", "budget"),
    "optimizer, train, budget": ("optimizer", "train", "budget"),
}


def prepared(model, order, budget="small"):
    for what in order:
        if what == "train":
            model.train()
        elif what == "budget":
            model.set_budget(budget)
        else:
            optimizer = sgd(model)
    return optimizer


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_loop_learns_in_any_order(name):
    """All orders end with the same bits; what the budget keeps has moved, and only that."""
    ends, losses = {}, {}
    for order, what in ORDERS.items():
        model = family(name)
        before = weights(model)
        losses[order] = steps(model, prepared(model, what))
        model.eval()
        ends[order] = weights(model)
    first = ends["train, budget, optimizer"]
    for order, end in ends.items():
        assert all(torch.equal(end[key], first[key]) for key in first), order
        assert losses[order] == losses["train, budget, optimizer"]
        assert losses[order][2] < losses[order][0] - 0.01
    assert_moved_where_kept(family(name), before, first)


def assert_moved_where_kept(model, before, after, budget="small"):
    config = model.elastic_config
    masks = {
        piece.rule.name: piece.rule.mask(piece.full, piece.kept).bool()
        for piece in pieces(model.architecture, config.parent_config, config.submodel(budget))
    }
    parameters = dict(model.named_parameters())
    for key, tensor in after.items():
        moved = tensor != before[key]
        mask = masks.get(key, torch.zeros_like(moved))
        assert not (moved & ~mask).any(), key
        if key in parameters and "embed" not in key:  # of the embeddings only the rows that were read
            assert moved.any() == mask.any(), key


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_learns_in_any_order(name):
    model = family(name)
    steps(model, prepared(model, ORDERS["train, budget, optimizer"]))
    expected = weights(model.eval())
    for train_first in (True, False):
        model = family(name)
        model.set_budget("small")
        accelerator = Accelerator(cpu=True)
        if train_first:
            model.train()
        wrapped, optimizer = accelerator.prepare(model, sgd(model))
        wrapped.train()
        steps(wrapped, optimizer, accelerator.backward)
        model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).eval()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(model).items())


@pytest.mark.parametrize("name", NAMES)
def test_ddp_around_a_family_at_a_budget(name, tmp_path):
    """Its buckets hold the family's parameters once that trains; before, it is refused, as it would hold on to those of the budget."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = family(name)
        steps(model, prepared(model, ORDERS["train, budget, optimizer"]))
        expected = weights(model.eval())
        model = family(name)
        model.set_budget("small")
        optimizer = sgd(model)
        with pytest.raises(HFElasticError, match=r"would not see its gradients: call train\(\) first"):
            DistributedDataParallel(model)
        model.train()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        seen = []
        wrapped.register_comm_hook(None, lambda state, bucket: _noted(bucket, seen))
        steps(wrapped, optimizer)
        assert sum(seen) >= sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(model.eval()).items())
    finally:
        torch.distributed.destroy_process_group()


def _noted(bucket, seen):
    seen.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


SHARED = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 3,
}
SHARED |= {"per_device_train_batch_size": 2, "learning_rate": 0.01, "seed": 3, "logging_steps": 1}


def trainer_of(kind, model, folder):
    """Without trl's auxiliary loss of routers, which reads a field that Granite's config does not have."""
    data = rows(12)
    if kind == "Trainer":
        data = Dataset.from_list([{"input_ids": r.tolist(), "labels": r.tolist()} for r in IDS.repeat(3, 1)])
        return Trainer(model=model, args=TrainingArguments(output_dir=str(folder), **SHARED), train_dataset=data)
    if kind == "SFTTrainer":
        args = SFTConfig(output_dir=str(folder), router_aux_loss_coef=0.0, **SHARED)
        return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())
    prompts = Dataset.from_list([{"prompt": text} for text in ("ab", "cd", "ef", "gh")])
    args = GRPOConfig(
        output_dir=str(folder), router_aux_loss_coef=0.0, num_generations=2, max_completion_length=6, **SHARED
    )
    return GRPOTrainer(
        model=model,
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer(),
        reward_funcs=lambda completions, **kwargs: [
            float(len(set(text))) + 0.1 * i for i, text in enumerate(completions)
        ],
    )


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer", "GRPOTrainer"])
@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_of_a_family_at_a_budget_learns_it(name, kind, tmp_path):
    """Set before the trainer is made, or after: the same weights, which moved where the budget keeps something."""
    ends = []
    for early in (True, False):
        torch.manual_seed(0)
        model = family(name)
        before = weights(model)
        if early:
            model.set_budget("small")
        trainer = trainer_of(kind, model, tmp_path)
        if not early:
            model.train()
            model.set_budget("small")
        trainer.train()
        assert model.budget == "small"
        ends.append(weights(model.eval()))
    assert_moved_where_kept(family(name), before, ends[0])
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_is_the_same_at_a_budget(name, tmp_path):
    """Names of layers and names of parameters have to be of one numbering, or some would be left out of decay."""
    model = family(name)
    trainer = trainer_of("Trainer", model, tmp_path)
    expected = set(trainer.get_decay_parameter_names(model))
    model.set_budget("small")
    assert set(trainer.get_decay_parameter_names(model)) == expected
    assert expected <= {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_switched_on_at_a_budget_is_on_in_training(name):
    model = family(name)
    model.set_budget("small")
    model.gradient_checkpointing_enable()
    optimizer = sgd(model)
    model.train()
    assert all(layer.gradient_checkpointing for layer in model.architecture.layers_of(model))
    checkpointed = steps(model, optimizer)
    other = family(name)
    assert checkpointed == steps(other, prepared(other, ORDERS["train, budget, optimizer"]))


def test_adapters_put_on_a_budget_in_evaluation_mode_are_refused():
    """They would sit on the modules of that budget, and training would pass them by."""
    from peft import LoraConfig, get_peft_model

    model = family("nano3")
    model.set_budget("large")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(HFElasticError, match="adapters are attached, and they do not follow a budget"):
        wrapped.train()


@pytest.mark.parametrize("name", NAMES)
def test_a_training_forward_gives_a_cache_of_its_budget(name):
    """Upstream would make one of the parent's layers, which a budget without some of them cannot fill."""
    model = family(name).eval()
    with torch.no_grad():
        whole = model.sized("small")(IDS).logits
        model.train()
        model.set_budget("small")
        first = model(IDS[:, :5], use_cache=True)
        rest = model(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=2e-4, rtol=0)
        out = model.generate(IDS, do_sample=False, max_new_tokens=4, pad_token_id=0)
        model.eval()
        assert torch.equal(out, model.generate(IDS, do_sample=False, max_new_tokens=4, pad_token_id=0))


def test_copies_of_a_family_at_a_budget_train_on_their_own():
    model = family("nano3")
    model.set_budget("small")
    twin = copy.deepcopy(model)
    before = weights(model)
    steps(twin, prepared(twin, ("optimizer", "train")))
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(model).items())
    assert any(not torch.equal(tensor, before[key]) for key, tensor in weights(twin.eval()).items())
