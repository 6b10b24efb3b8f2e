"""Hand-over batches: their loss and gradient are those of two models and a cache written out by hand, row by row and without padding."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapted import adapted
from by_hand import ByHand
from cases import BUDGETS, build_parent
from runs import Recorder, family, rows, trainer
from test_resume import RUN, StopAt, assert_same_weights
from torch.func import functional_call
from transformers import DynamicCache

from hf_elastic import ElasticConfig, ElasticConfigError, ElasticForCausalLM
from hf_elastic.testing.adapting import adapter_parameters, effective_weights
from hf_elastic.trainers.handover import CUT, cut_rows, refuse_checkpointing

HANDOVER: dict[str, Any] = {"handover_probability": 0.6, "activation_checkpointing": False}
ALWAYS = {**HANDOVER, "handover_probability": 1.0}
# medium and small drop a Mamba layer
POSSIBLE = {
    ("full", "large"),
    ("full", "medium"),
    ("full", "small"),
    ("large", "full"),
    ("large", "medium"),
    ("large", "small"),
}
POSSIBLE |= {("medium", "small"), ("small", "medium")}
# Large, because m / (sqrt(v) + eps) turns float noise in a gradient near zero into a whole step if eps is small.
ADAM = {"adam_epsilon": 1e-3, "weight_decay": 0.0}
# float32; weights of order 1 after two steps of at most 0.01 each, from gradients that agree to about 1e-5.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


class HandingOver(ByHand):
    """As `ByHand`, where a batch named `a>b` begins in `a` and goes on in `b`."""

    def divergence(self, budget, batch, weights=None):
        if ">" not in budget:
            return super().divergence(budget, batch, weights)
        teacher = self.logits(None, batch).double().softmax(-1)
        total, count = torch.zeros((), dtype=torch.float64), 0
        begins = self.logits(budget.partition(">")[0], batch, weights).double().softmax(-1)
        for i, cut in enumerate(batch[CUT].tolist()):
            place = batch["attention_mask"][i].nonzero()[:, 0]
            ids, at = batch["input_ids"][i, place], cut - int(place[0])
            student = self.rest(*budget.split(">"), ids, at, weights).double().softmax(-1)
            student = torch.cat([begins[i, place][:at], student])
            p = teacher[i, place]
            per_token = (p * (p.log() - student.log())).sum(-1)[:-1]
            target = batch["labels"][i, place][1:] != -100
            total, count = total + (per_token * target).sum(), count + int(target.sum())
        return total, count

    def rest(self, source, target, ids, cut, weights):
        """Logits `(T - cut, V)` of one row after its first tokens ran in another submodel, both as masks on the parent's weights."""
        config = self.parent.config
        cache = DynamicCache(config=config)
        first, second = (self.masked(name, weights) for name in (source, target))
        functional_call(*first, (), {"input_ids": ids[None, :cut], "past_key_values": cache, "use_cache": True})
        k, n = (self.elastic.submodel(name)["hidden"] for name in (source, target))
        given = DynamicCache(config=config)
        kept = self.elastic.submodel(target)
        for i, layer in enumerate(cache.layers):
            if getattr(layer, "keys", None) is not None:  # also of dropped layers: upstream counts tokens in the first
                given.update(layer.keys * math.sqrt(n / k), layer.values * math.sqrt(n / k), i)
            elif i in kept.layers and getattr(layer, "has_previous_state", {}).get(0):
                conv, ssm = layer.conv_states[0] * math.sqrt(n / k), layer.recurrent_states[0] * (n / k)
                # What the second submodel does not keep would still reach its norm. The convolution's weights are masked.
                groups = getattr(config, "n_groups", None) or config.mamba_n_groups
                heads = kept.at(i)["mamba_heads"] // groups
                ssm = ssm.unflatten(1, (groups, -1))
                ssm = (ssm * (torch.arange(ssm.shape[2]) < heads)[:, None, None]).flatten(1, 2)
                given.update_conv_state(conv, i)
                given.update_recurrent_state(ssm, i)
        ids = torch.arange(cut, len(ids))[None], ids[None, cut:]
        return functional_call(
            *second, (), {"input_ids": ids[1], "position_ids": ids[0], "past_key_values": given, "use_cache": True}
        ).logits[0]


def drawn(recorder: Recorder) -> list[str]:
    return [name for step in recorder.steps for name, _ in step if ">" in name]


@pytest.mark.parametrize("name", BUDGETS)
def test_steps_with_hand_overs_are_those_written_by_hand(name, tmp_path):
    """Rows of different lengths, and a token to cut at that some have. Granite's Mamba projection has a bias, which left padding is not
    exact for, so there all rows are cut at the same column."""
    ragged = name == "nano3"
    made = trainer(
        tmp_path,
        family(name),
        dataset=rows(12, shortest=5 if ragged else 14, longest=20 if ragged else 14),
        handover_token="A" if ragged else None,
        gradient_accumulation_steps=6,
        loss_chunk_size=5,
        seed=3,
        **HANDOVER,
        **ADAM,
    )
    recorder = Recorder().watch(made)
    made.train()
    pairs = [pair.split(">") for pair in drawn(recorder)]
    sizes = {key: s["hidden"] for key, s in made.model.elastic_config.family().items()}
    assert any(sizes[a] > sizes[b] for a, b in pairs)
    assert (
        any(sizes[a] < sizes[b] for a, b in pairs) == ragged
    )  # granite's small keeps too few layers to begin for another
    cuts = [batch[CUT] for step in recorder.steps for _, batch in step if CUT in batch]
    assert len(pairs) == len(cuts) < 12
    assert any(len(set(cut.tolist())) > 1 for cut in cuts) == ragged
    hand = HandingOver(name, made.model.elastic_config)
    steps = zip(recorder.steps, recorder.rates, strict=True)
    losses = [hand.step(step, rate, 1.0, eps=ADAM["adam_epsilon"], decay=0.0) for step, rate in steps]
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == pytest.approx(losses, rel=1e-4)
    assert {key[:-3] for entry in logged for key in entry if ">" in key} == {">".join(pair) for pair in pairs}
    for key, p in made.model.named_parameters():
        torch.testing.assert_close(
            p.detach(), hand.parameters[key], **CLOSE, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_adapters_take_part_in_hand_overs(tmp_path):
    """SGD on A and B; the parent without adapters is the teacher."""
    made = trainer(
        tmp_path, adapted("nano3"), optim="sgd", learning_rate=0.5, max_grad_norm=0.0, max_steps=1, seed=3, **ALWAYS
    )
    recorder = Recorder().watch(made)
    made.train()
    [[(pair, batch)]] = recorder.steps
    assert ">" in pair
    wrapped = adapted("nano3")
    mine = adapter_parameters(wrapped)
    total, count = HandingOver("nano3", made._elastic.elastic_config).divergence(
        pair, batch, effective_weights(wrapped)
    )
    found = torch.autograd.grad(total / count, list(mine.values()), allow_unused=True)
    moved = 0.0
    for (key, p), gradient in zip(mine.items(), found, strict=True):
        step = torch.zeros_like(p) if gradient is None else 0.5 * gradient
        ours = adapter_parameters(made.model)[key]
        torch.testing.assert_close(ours, p - step, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
        moved = max(moved, float(step.abs().max()))
    assert moved > 0.01
    assert made._elastic.elastic_config.handover_trained


def test_gradients_reach_what_only_the_first_budget_keeps(tmp_path):
    """A Mamba layer that `small` drops: with full > small its output is in what the attention layer after it kept."""
    moved = {}
    for probability in (0.0, 1.0):
        made = trainer(
            tmp_path / str(probability),
            budget_probabilities={"full": 0.01, "small": 0.99},
            max_steps=1,
            weight_decay=0.0,
            teacher_model=build_parent("nano3", 5),
            seed=3,
            **{**HANDOVER, "handover_probability": probability},
        )
        weight = made.model.model.layers[4].mixer.in_proj.weight
        before = weight.detach().clone()
        recorder = Recorder().watch(made)
        made.train()
        assert recorder.steps[0][0][0] == ("full>small" if probability else "small")
        moved[probability] = float((weight.detach() - before).abs().max())
        assert made.model.elastic_config.handover_trained == bool(probability)
    assert moved[0.0] == 0.0
    assert moved[1.0] > 1e-3


def test_hidden_states_are_compared_in_both_parts(tmp_path):
    made = trainer(tmp_path, max_steps=1, seed=3, hidden_loss_weight=2.0, **ALWAYS)
    recorder = Recorder().watch(made)
    made.train()
    [[(pair, batch)]] = recorder.steps
    source = pair.partition(">")[0]
    logs = made.state.log_history[0]
    columns = torch.arange(batch["labels"].shape[1])
    begun = {**batch, "labels": batch["labels"].masked_fill(columns > batch[CUT][:, None], -100)}
    hand = HandingOver("nano3", made.model.elastic_config)
    distance = hand.distance(source, begun, "cosine", None, hand.parameters)
    divergence, before = hand.divergence(source, begun)
    count = int((batch["labels"][:, 1:] != -100).sum())
    assert 0 < before < count
    assert logs[f"{source}/hidden"] == pytest.approx(float(distance) / before, rel=1e-4)
    assert logs[f"{source}/kl"] == pytest.approx(float(divergence) / before, rel=1e-4)
    parts = {source: before, pair: count - before}
    losses = [n * (logs[f"{name}/kl"] + 2.0 * logs[f"{name}/hidden"]) for name, n in parts.items()]
    assert logs["loss"] == pytest.approx(sum(losses) / count, rel=1e-5)
    assert 0.01 < logs[f"{pair}/hidden"] < 2.0


def test_stages_have_probabilities_of_their_own_and_leave_the_other_draws_alone(tmp_path):
    stages = [{"steps": 1}, {"steps": 1, "handover_probability": 1.0}]
    logs, given = [], []
    for i, options in enumerate(({"stages": stages, "max_steps": -1, **HANDOVER, "handover_probability": 0.0}, {})):
        made = trainer(tmp_path / str(i), gradient_accumulation_steps=3, seed=3, **{"max_steps": 2, **options})
        recorder = Recorder().watch(made)
        made.train()
        logs.append(made.state.log_history[0])
        given.append(recorder.steps)
    assert logs[0] == logs[1]  # of the first step, of weights that are the same to the last bit
    for ours, plain in zip(*given, strict=True):
        assert [name.rpartition(">")[2] for name, _ in ours] == [name for name, _ in plain]
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for (_, a), (_, b) in zip(ours, plain, strict=True))
    named = [name for name, _ in given[0][1]]
    assert all(">" in name for name in named)
    assert {tuple(name.split(">")) for name in named} <= POSSIBLE


def test_hand_overs_begin_when_they_shall(tmp_path):
    """The same run as with stages that say so, which is the plain one until then; a number beyond the first stage counts all steps."""
    stages = [{"steps": 2, "max_length": 12}, {"steps": 2, "handover_probability": 0.0}, {"steps": 3}]
    for given, start, expected in (
        ({"max_steps": 4}, 0.5, [(2, 0.0), (2, 1.0)]),
        ({"max_steps": 4}, 3, [(3, 0.0), (1, 1.0)]),
        ({"max_steps": -1, "num_train_epochs": 2}, 5, [(5, 0.0), (1, 1.0)]),
        ({"max_steps": -1, "stages": stages}, 0.8, [(2, 0.0), (2, 0.0), (2, 0.0), (1, 1.0)]),
        ({"max_steps": -1, "stages": stages}, 1, [(1, 0.0), (1, 1.0), (2, 0.0), (3, 1.0)]),
    ):
        made = trainer(tmp_path, **{**ALWAYS, **given}, handover_start=start)
        assert [(s.steps, s.handover_probability) for s in made.curriculum.stages] == expected
        lengths = [made.curriculum.stage(step).max_length for step in range(7)]
        assert lengths == ([12] * 2 + [None] * 5 if "stages" in given else [None] * 7)
    recorders = []
    for name, fields in (("late", {**ALWAYS, "handover_start": 0.5}), ("plain", {})):
        made = trainer(tmp_path / name, seed=3, max_steps=2, **fields)
        recorders.append(Recorder().watch(made))
        made.train()
    late, plain = ([name for step in recorder.steps for name, _ in step] for recorder in recorders)
    assert late[0] == plain[0]
    assert ">" in late[1]
    assert late[1].endswith(f">{plain[1]}")
    assert torch.equal(recorders[0].steps[0][0][1]["labels"], recorders[1].steps[0][0][1]["labels"])


def test_a_killed_run_goes_on_with_the_same_hand_overs(tmp_path):
    run = {
        **RUN,
        "stages": None,
        "max_steps": 2,
        "save_steps": 1,
        "gradient_accumulation_steps": 3,
        "seed": 3,
        **HANDOVER,
    }
    reference = trainer(tmp_path / "straight", **run)
    given = Recorder().watch(reference)
    reference.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", callbacks=[StopAt(1)], **run).train()
    resumed = trainer(tmp_path / "killed", **run)
    recorder = Recorder().watch(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert [[name for name, _ in step] for step in recorder.steps] == [
        [name for name, _ in step] for step in given.steps[1:]
    ]
    assert all(any(">" in name for name, _ in step) for step in given.steps)
    assert_same_weights(resumed.model, reference.model)
    folder = tmp_path / "killed" / "checkpoint-1"
    assert ElasticForCausalLM.from_pretrained(folder).elastic_config.handover_trained
    for other, there in (
        ({"handover_probability": 0.3}, "0.6 there, 0.3"),
        ({"handover_probability": 0.0}, "0.6 there, N"),
    ):
        with pytest.raises(ElasticConfigError, match=rf"stages\[0\]\.handover_probability \({there}"):
            trainer(tmp_path / "killed", **{**run, **other}).train(resume_from_checkpoint=str(folder))
    later = trainer(tmp_path / "later", **{**run, "max_steps": 1})
    assert not later.model.elastic_config.handover_trained
    later.train(resume_from_checkpoint=str(folder))  # which is at its end
    assert later.model.elastic_config.handover_trained


def test_rows_are_cut_before_the_last_marker_or_at_a_share():
    ids = torch.tensor(
        [[3, 4, 9, 5, 9, 6, 7, 8], [3, 4, 5, 6, 7, 8, 0, 0], [0, 0, 0, 3, 4, 5, 6, 9], [9, 4, 0, 0, 0, 0, 0, 0]]
    )
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2, [0] * 3 + [1] * 5, [1, 1] + [0] * 6])
    # before the second 9; after half of six; two tokens stay behind the cut; one stays before it
    assert cut_rows(ids, mask, 0.5, 9).tolist() == [4, 3, 6, 1]
    assert cut_rows(ids, mask, 0.5).tolist() == [4, 3, 5, 1]
    assert cut_rows(ids, mask, 0.0).tolist() == [1, 1, 4, 1]
    assert cut_rows(ids, None, 0.99).tolist() == [6, 6, 6, 6]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "probability": ({"handover_probability": 1.5}, "handover_probability=1.5 must be in"),
    "stage": (
        {"stages": [{"steps": 1, "handover_probability": "x"}], "max_steps": -1},
        r"stages\[0\]\.handover_probability='x' must be a number in",
    ),
    "checkpointing, the default": ({"activation_checkpointing": None}, "set activation_checkpointing=False"),
    "router": ({"router_targets": {"a": 0.5}, "router_steps": 1}, "does not work with a router"),
    "token alone": ({"handover_probability": 0.0, "handover_token": "A"}, "handover_token='A' would be ignored"),
    "start": ({"handover_start": 1.5}, "handover_start=1.5 must be a share of the steps"),
    "start alone": ({"handover_probability": 0.0, "handover_start": 0.5}, "handover_start=0.5 would be ignored"),
    "start too late": (
        {"handover_start": 2, "max_steps": 2},
        "the run has 2 steps, none of which would be a hand-over",
    ),
    "start after the stages": (
        {"handover_start": 3, "stages": [{"steps": 2}], "max_steps": -1},
        "the run has 2 steps, none of which",
    ),
    "share of epochs": ({"handover_start": 0.5, "max_steps": -1}, "how many the run has is not known"),
    "token": ({"handover_token": "AB"}, "handover_token='AB' must be one token"),
    "pair": (
        {"budget_probabilities": {"small": 1.0}},
        r"stages\[0\] has handover_probability=0.6, but among the budgets it draws \(small\) no cache",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case, tmp_path):
    fields, error = REFUSED[case]
    with pytest.raises(ElasticConfigError, match=error):
        trainer(tmp_path, **{**HANDOVER, **fields})


def test_a_model_that_checkpoints_is_refused(tmp_path):
    model = family()
    model.activation_checkpointing_enable()
    with pytest.raises(ElasticConfigError, match="does not work with the model's activation checkpointing"):
        trainer(tmp_path, model, **HANDOVER)
    model.activation_checkpointing_disable()
    state = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(activation_checkpointing=True)))
    with pytest.raises(ElasticConfigError, match="does not work with FSDP's activation checkpointing"):
        refuse_checkpointing(model, state)


def test_what_the_config_says_about_hand_over(tmp_path):
    model = family()
    config = model.elastic_config
    assert (config.handover_trained, config.elastic["version"]) == (False, 1)
    config.handover_trained = True
    assert (config.elastic["handover"], config.elastic["version"]) == ({"trained": True}, 3)
    model.save_pretrained(tmp_path)
    loaded = ElasticForCausalLM.from_pretrained(tmp_path, budget="medium")
    assert loaded.elastic_config.handover_trained
    loaded.resize_token_embeddings(70)
    assert loaded.elastic_config.handover_trained
    config.handover_trained = False
    assert (config.elastic.get("handover"), config.elastic["version"]) == (None, 1)
    for wrong, error in (
        (True, "elastic.handover=True must be a dict"),
        ({"trained": 1}, "elastic.handover.trained=1 must be true or false"),
        ({"trained": True, "by": 3}, "unknown key 'by' in elastic.handover"),
    ):
        with pytest.raises(ElasticConfigError, match=error):
            ElasticConfig(
                parent_config=config.parent_config, elastic={**config.elastic, "version": 3, "handover": wrong}
            )
    with pytest.raises(ElasticConfigError, match=r"unknown key 'handover' in elastic \(format 2\)"):
        ElasticConfig(
            parent_config=config.parent_config, elastic={**config.elastic, "version": 2, "handover": {"trained": True}}
        )
