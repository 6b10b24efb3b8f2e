"""Scores against references written from the equations, on models whose every tensor is random."""

from __future__ import annotations

import pytest
import torch
from cases import CONFIGS, VOCAB
from torch import nn

from hf_elastic import CheckpointError, ElasticConfigError, Scores, score
from hf_elastic.architectures import get_architecture
from hf_elastic.elastification.importance import rank_layers
from hf_elastic.submodels.slicing import slice_state_dict

# Sums of a few hundred float32 terms in another order.
CLOSE = {"rtol": 2e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, list[int]]]:
    """Rows of different lengths: padding must not count."""
    generator = torch.Generator().manual_seed(3)
    return [
        {"input_ids": torch.randint(0, VOCAB, (length,), generator=generator).tolist()} for length in (11, 7, 13, 5)
    ]


def _streams(model, rows):
    """Per row the residual stream before every layer, and after the last one, each `(T, hidden)`; nothing is padded here."""
    for row in rows:
        yield _stream(model, row["input_ids"])


def _stream(model, ids):
    caught: list[torch.Tensor] = []
    layers = get_architecture(model.config.model_type).layers_of(model)
    hooks = [layer.register_forward_pre_hook(lambda m, args: caught.append(args[0][0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda m, args, out: caught.append(out[0])))
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return caught


def _norm(weight: torch.Tensor, eps: float, x: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.fixture(scope="module")
def nano(original, rows):
    model = original("nano3")
    with torch.no_grad():
        return model, score(model, rows, batch_size=3, progress=False), list(_streams(model, rows))


def test_hidden_is_the_sum_of_normed_magnitudes(nano):
    model, scores, streams = nano
    eps = model.config.layer_norm_epsilon
    weights = [layer.norm.weight for layer in model.model.layers] + [model.model.norm_f.weight]
    expected = sum(_norm(w, eps, x).abs().sum(0) for stream in streams for w, x in zip(weights, stream, strict=True))
    torch.testing.assert_close(scores.values["hidden"][-1].float(), expected, **CLOSE)


def test_ffn_is_the_magnitude_after_the_activation(nano):
    model, scores, streams = nano
    layer = model.config.layers_block_type.index("mlp")
    block = model.model.layers[layer]
    expected = torch.zeros(model.config.intermediate_size)
    for stream in streams:
        normed = _norm(block.norm.weight, model.config.layer_norm_epsilon, stream[layer])
        expected += (normed @ block.mixer.up_proj.weight.T).relu().square().sum(0)
    assert list(scores.values["ffn"]) == [layer]
    torch.testing.assert_close(scores.values["ffn"][layer].float(), expected, **CLOSE)


def test_mamba_moments_are_of_the_x_rows(nano):
    model, scores, streams = nano
    c = model.config
    for layer in (i for i, kind in enumerate(c.layers_block_type) if kind == "linear_attention"):
        block = model.model.layers[layer]
        inner = c.mamba_num_heads * c.mamba_head_dim
        w_x = block.mixer.in_proj.weight[inner : 2 * inner]  # z comes first
        expected = torch.zeros(c.mamba_num_heads, c.mamba_head_dim)
        for stream in streams:
            s = _norm(block.norm.weight, c.layer_norm_epsilon, stream[layer]) @ w_x.T
            for head in range(c.mamba_num_heads):
                for channel in range(c.mamba_head_dim):
                    expected[head, channel] += s[:, head * c.mamba_head_dim + channel].square().sum()
        torch.testing.assert_close(scores.values["mamba_channels"][layer].float(), expected, **CLOSE)


def test_attention_heads_are_the_norms_at_the_output_projection(nano, rows):
    model, scores, _ = nano
    c = model.config
    layer = c.layers_block_type.index("full_attention")
    per_kv = c.num_attention_heads // c.num_key_value_heads
    expected = torch.zeros(c.num_key_value_heads, per_kv)
    for row in rows:
        caught = []
        hook = model.model.layers[layer].mixer.o_proj.register_forward_pre_hook(
            lambda m, args, caught=caught: caught.append(args[0][0])
        )
        model(torch.tensor([row["input_ids"]]))
        hook.remove()
        for head in range(c.num_attention_heads):
            output = caught[0][:, head * c.head_dim : (head + 1) * c.head_dim]
            expected[head // per_kv, head % per_kv] += output.square().sum(-1).sqrt().sum()
    torch.testing.assert_close(scores.values["attention_heads"][layer].float(), expected, **CLOSE)


def test_experts_are_reap_and_their_neurons_are_per_expert(nano):
    model, scores, streams = nano
    c = model.config
    layer = c.layers_block_type.index("moe")
    block = model.model.layers[layer]
    gain, tokens = torch.zeros(c.n_routed_experts), torch.zeros(c.n_routed_experts)
    neurons = torch.zeros(c.n_routed_experts, c.moe_intermediate_size)
    for stream in streams:
        x = _norm(block.norm.weight, c.layer_norm_epsilon, stream[layer])
        _, weights, index = block.mixer.gate(x)
        for token in range(len(x)):
            for slot in range(c.num_experts_per_tok):
                expert = int(index[token, slot])
                inner = (block.mixer.experts.up_proj[expert] @ x[token]).relu().square()
                gain[expert] += weights[token, slot] * (block.mixer.experts.down_proj[expert] @ inner).norm()
                tokens[expert] += 1
                neurons[expert] += inner
    expected = torch.where(tokens > 0, gain / tokens.clamp(min=1), 0.0)
    torch.testing.assert_close(scores.values["experts"][layer].float(), expected, **CLOSE)
    torch.testing.assert_close(scores.values["expert_ffn"][layer].float(), neurons, **CLOSE)


def test_gated_experts_are_scored_after_the_gate(original, rows):
    model = original("granite")
    scores = score(model, rows, axes=["expert_ffn"], batch_size=2, progress=False)
    caught = []
    experts = model.model.layers[1].block_sparse_moe.experts
    hook = experts.register_forward_pre_hook(lambda m, args: caught.append(args))
    for row in rows:
        model(torch.tensor([row["input_ids"]]))
    hook.remove()
    expected = torch.zeros(experts.num_experts, experts.intermediate_dim)
    for x, index, _ in caught:
        for token in range(len(x)):
            for expert in index[token].tolist():
                width = experts.intermediate_dim
                gate, up = experts.gate_up_proj[expert][:width], experts.gate_up_proj[expert][width:]
                expected[expert] += (nn.functional.silu(gate @ x[token]) * (up @ x[token])).abs()
    torch.testing.assert_close(scores.values["expert_ffn"][1].float(), expected, **CLOSE)


@pytest.mark.parametrize("name", ["nano2", "granite"])
def test_layers_are_removed_by_their_error_on_the_logits(name, original, rows):
    """The reference leaves layers out by building a smaller stock model, not by skipping them in the parent."""
    model = original(name)
    batch = {"input_ids": torch.tensor([rows[0]["input_ids"]]), "attention_mask": torch.ones(1, 11, dtype=torch.int64)}
    architecture = get_architecture(model.config.model_type)
    full = model(**batch).logits

    def error(kept: tuple[int, ...]) -> float:
        submodel = architecture.full(model.config)
        submodel = type(submodel)(submodel.items, kept, submodel.depth)
        smaller = type(model)(architecture.config_for(model.config, submodel)).eval()
        smaller.load_state_dict(slice_state_dict(architecture, model.config, model.state_dict(), submodel))
        return float((smaller(**batch, use_cache=False).logits - full).square().sum() / full.square().sum())

    order = rank_layers(model, [batch], progress=False)
    remaining = list(range(architecture.depth(model.config)))
    for layer, measured in order[:-1]:  # without any layer there is no stock model to compare with
        errors = {i: error(tuple(j for j in remaining if j != i)) for i in remaining}
        assert min(errors, key=errors.get) == layer
        assert measured == pytest.approx(errors[layer], rel=1e-4)
        remaining.remove(layer)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_axis_of_every_parent_is_scored_and_the_model_is_left_alone(name, original, rows):
    model = original(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    scores = score(model, rows, progress=False)
    architecture = get_architecture(model.config.model_type)
    for axis in architecture.available_axes(model.config):
        assert scores.has(axis.name)
    for layers in scores.values.values():
        for values in layers.values():
            assert values.dtype == torch.float64
            assert values.count_nonzero() > values.numel() // 2
    assert scores.info == {"model_type": model.config.model_type, "samples": 4, "tokens": 36}
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_batches_do_not_matter(original, rows):
    model = original("nano3")
    one, four = (score(model, rows, batch_size=n, progress=False) for n in (1, 4))
    for axis, layers in one.values.items():
        for layer, values in layers.items():
            torch.testing.assert_close(values, four.values[axis][layer], rtol=1e-4, atol=1e-6)


def test_no_more_rows_are_read_than_asked_for_and_masked_tokens_do_not_count(original, rows):
    def stream():
        yield {"input_ids": [1, 2, *rows[0]["input_ids"]], "attention_mask": [0, 0] + [1] * 11}
        yield rows[1]
        raise AssertionError("a row beyond samples was read")

    scores = score(original("nano2"), stream(), samples=2, max_length=9, progress=False)
    plain = score(original("nano2"), rows[:2], max_length=9, progress=False)
    assert scores.info["tokens"] == 9 + 7
    assert torch.equal(scores.values["hidden"][-1], plain.values["hidden"][-1])


def test_rows_without_tokens_are_passed_over(original, rows):
    """Empty lines of a text; a batch of them alone would stop the run."""
    model = original("nano2")
    empty = [{"input_ids": []}, {"input_ids": [1, 2], "attention_mask": [0, 0]}]
    padded = [empty[0], rows[0], *empty, *rows[1:], *empty]
    one, other = (score(model, r, batch_size=2, progress=False) for r in (rows, padded))
    assert all(torch.equal(t, other.values[axis][i]) for axis, layers in one.values.items() for i, t in layers.items())
    assert one.info == other.info


def test_scores_round_trip(nano, tmp_path):
    _, scores, _ = nano
    scores.layers = [(2, 0.5), (0, 1.25)]
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert (loaded.layers, loaded.info, loaded.layer_ranking) == (scores.layers, scores.info, [0, 2])
    scores.layers = []
    assert loaded.values.keys() == scores.values.keys()
    for axis, layers in scores.values.items():
        assert all(torch.equal(loaded.values[axis][layer], values) for layer, values in layers.items())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no scores"):
        Scores.load(tmp_path / "missing")
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(CheckpointError, match="holds no scores"):
        Scores.load(tmp_path / "text")


def test_unusable_calibration_is_refused(original):
    with pytest.raises(ElasticConfigError, match="has no rows"):
        score(original("nano2"), [], progress=False)
    with pytest.raises(ElasticConfigError, match=r"columns \['text'\]; give input_ids"):
        score(original("nano2"), [{"text": "hello"}], progress=False)
    with pytest.raises(ElasticConfigError, match="unknown axis 'fnn'.*Did you mean 'ffn'"):
        score(original("nano2"), [{"input_ids": [1, 2]}], axes=["fnn"], progress=False)
