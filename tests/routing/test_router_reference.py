"""The router's equations against references written from their definitions: values and gradients.

Samples (arXiv 2511.16664, eq. 6-8), costs at expected sizes and the resource loss (eq. 12), and the forward pass at a mixture (eq. 9, 20-42)
with masks multiplied onto the weights of the stock model by name.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import build_parent
from routed import CHOICES, PARENTS, RANKING, config_of
from test_router import CLOSE

from hf_elastic import ElasticConfig, elastify
from hf_elastic.configuration.budgets import Limit, parse_limit
from hf_elastic.routing.router import BudgetRouter
from hf_elastic.submodels.soft import SoftUnits

MEMORY = {"memory": "1kB", "context_length": 300, "batch_size": 3, "dtype": "bfloat16"}
LIMITS = {"total": Limit("total", 1.0), "active": Limit("active", 1.0), "memory": parse_limit(MEMORY)}
PER_LAYER = ("shared_expert_ffn", "mamba_heads")


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


@pytest.fixture
def router(original):
    def make(name, targets=None, std=0.5, seed=3):
        torch.manual_seed(seed)
        return BudgetRouter(config_of(original(name), name), targets or {"half": 0.6}, per_layer=PER_LAYER, std=std)

    return make


# Samples


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_samples(hard, router):
    ours = router("nano3", {"large": 0.8, "half": 0.6})
    weights = torch.randn(16, generator=torch.Generator().manual_seed(0))
    sampled = ours.sample("half", 0.7, 4.0, hard=hard, generator=torch.Generator().manual_seed(5))
    assert len(sampled) == 7 + 2 + 3  # one network per axis, two and three where it is one per layer
    sum((pi * weights[: len(pi)]).sum() for pi in sampled.values()).backward()
    noise = torch.Generator().manual_seed(5)
    index = 2  # of "half" among full, large, half
    for key, network in zip(ours.keys, ours.networks.values(), strict=True):
        first, second = (layer.weight.detach().clone().requires_grad_() for layer in (network[0], network[2]))
        hidden = first[:, index]  # W u of a one-hot u
        logits = second @ torch.where(hidden > 0, hidden, 0.1 * hidden)
        gumbel = -(-torch.rand(len(logits), generator=noise).clamp(1e-9, 1 - 1e-7).log()).log()
        z = (4.0 * logits + gumbel) / 0.7
        pi = z.exp() / z.exp().sum()
        wanted = (pi == pi.max()).float() if hard else pi
        torch.testing.assert_close(sampled[key], wanted, **CLOSE)
        (pi * weights[: len(pi)]).sum().backward()  # straight through: the gradient is the soft one
        torch.testing.assert_close(network[0].weight.grad, first.grad, **CLOSE)
        torch.testing.assert_close(network[2].weight.grad, second.grad, **CLOSE)


# Costs


def count_by_hand(name, c, sizes, keep):
    """`(total, active, bytes)` of `MEMORY`, added up from the layers' definitions.

    Args:
        sizes: From layer to sizes; `None` for the global ones.
        keep: From layer to the weight of the layer.
    """
    d, v, moe = sizes(None)["hidden"], c.vocab_size, name == "nano3"
    kv, hd = c.num_key_value_heads, 8
    groups, state, kernel = (
        (c.n_groups, c.ssm_state_size, c.conv_kernel) if moe else (c.mamba_n_groups, c.mamba_d_state, c.mamba_d_conv)
    )
    total = active = 2 * v * d + d
    fp32 = cached = 0
    for layer, kind in enumerate(c.layers_block_type if moe else c.layer_types):
        s = sizes(layer)
        params = d if moe else 2 * d
        idle = here = 0
        if kind == "linear_attention":
            inner = s["mamba_heads"] * s["mamba_head_dim"]
            conv = inner + 2 * groups * state
            rows = inner + conv + s["mamba_heads"]
            params = params + rows * d + conv * kernel + conv + 3 * s["mamba_heads"] + inner + inner * d
            params = params + (0 if moe else rows + d)
            here = here + 2 * conv * kernel + 4 * inner * state
        elif kind == "full_attention":
            params = params + 2 * s["attention_heads"] * hd * d + 2 * kv * hd * d
            params = params + (0 if moe else s["attention_heads"] * hd + 2 * kv * hd + d)
            here = here + 2 * 300 * 2 * kv * hd
        elif kind == "mlp":
            params = params + 2 * d * s["ffn"]
        if kind == "moe" or not moe:
            matrices = 2 if moe else 3
            one = matrices * d * s["expert_ffn"]
            params = params + one * s["experts"] + s["experts"] * d + matrices * d * s["shared_expert_ffn"]
            idle = one * (s["experts"] - s["experts_per_token"])
            fp32 = fp32 + keep(layer) * (s["experts"] if moe else 0)
        total = total + keep(layer) * params
        active = active + keep(layer) * (params - idle)
        cached = cached + keep(layer) * here
    return {"total": total, "active": active, "memory": 2 * total + 4 * fp32 + 3 * cached}


def expected_by_hand(router, name, pi):
    full = router.full

    def sizes(layer):
        known = dict(full.at(layer))
        for axis in known:
            for key in ((axis, layer), (axis, None)):
                if key in pi:
                    known[axis] = sum(p * size for p, size in zip(pi[key], CHOICES[name][axis], strict=True))
                    break
        return known

    def keep(layer):
        rank = RANKING[name].index(layer)
        return sum(p for p, count in zip(pi["layers", None], CHOICES[name]["layers"], strict=True) if rank < count)

    return count_by_hand(name, router.config.parent_config, sizes, keep)


def draw(router, seed=1):
    """Random logits per key, and their softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = {key: torch.randn(len(router.choices[key[0]]), generator=generator) for key in router.keys}
    logits = {key: values.requires_grad_() for key, values in logits.items()}
    return logits, {key: values.softmax(-1) for key, values in logits.items()}


def same_gradients(ours, theirs, logits):
    leaves = list(logits.values())
    for mine, wanted in zip(
        torch.autograd.grad(ours, leaves, allow_unused=True, retain_graph=True),
        torch.autograd.grad(theirs, leaves, allow_unused=True, retain_graph=True),
        strict=True,
    ):
        # An axis that does not touch the quantity (experts, active parameters) has no gradient, or one of zero.
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if mine is None else mine,
            zero if wanted is None else wanted,
            rtol=1e-4,
            atol=1e-5 * max(1.0, float(theirs.detach())),
        )


@pytest.mark.parametrize("quantity", LIMITS)
@pytest.mark.parametrize("name", PARENTS)
def test_expected_costs(name, quantity, router):
    ours = router(name)
    logits, pi = draw(ours)
    cost = ours.expected(ours.mixture(pi), LIMITS[quantity])
    wanted = expected_by_hand(ours, name, pi)[quantity]
    torch.testing.assert_close(cost, wanted, rtol=1e-5, atol=0)
    same_gradients(cost, wanted, logits)


@pytest.mark.parametrize("quantity", LIMITS)
@pytest.mark.parametrize("name", PARENTS)
def test_resource_loss(name, quantity, router):
    """`abs(P/T - 1)`; inside 5 % zero, with a gradient of zero."""
    ours = router(name)
    logits, pi = draw(ours)
    cost = expected_by_hand(ours, name, pi)[quantity]
    for off in (0.7, 0.94, 0.96, 1.0, 1.04, 1.06, 1.5):
        target = float(cost.detach()) / off
        ours.limits["half"] = replace(LIMITS[quantity], value=target)
        loss = ours.resource_loss("half", pi)
        wanted = (cost / target - 1).abs() if abs(off - 1) > 0.05 else 0 * cost
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
        same_gradients(loss, wanted, logits)


def test_the_term_of_the_whole_parent(router):
    """`10 * MSE(pi, one-hot largest)`, the mean over all networks."""
    ours = router("nano3")
    logits, pi = draw(ours)
    loss = ours.resource_loss("full", pi)
    errors = []
    for values in pi.values():
        wanted = [1.0] + [0.0] * (len(values) - 1)
        errors.append(sum((p - w) ** 2 for p, w in zip(values, wanted, strict=True)) / len(wanted))
    wanted = 10 * sum(errors) / len(errors)
    torch.testing.assert_close(loss, wanted, **CLOSE)
    same_gradients(loss, wanted, logits)


def test_memory_counts_what_generation_keeps(original, router):
    """The limit's own count of a decided submodel: `test_table` compares its parts with the bytes of a real cache."""
    ours = router("nano3")
    cost = ours.count.full
    wanted = cost.weight_bytes(torch.bfloat16) + 3 * (300 * cost.kv_bytes_per_token() + cost.state_bytes())
    assert LIMITS["memory"].measure(cost, torch.float32) == wanted
    by_hand = count_by_hand("nano3", original("nano3").config, ours.full.at, lambda layer: 1)
    assert wanted == by_hand["memory"]
    assert (cost.total_params, cost.active_params) == (by_hand["total"], by_hand["active"])


# The forward pass


def mask(pi, choices, size, groups=1):
    """`sum_i pi_i [j < k_i]`, in every group."""
    entries = torch.arange(size // groups)
    one = sum(p * (entries < k // groups).float() for p, k in zip(pi, choices, strict=True))
    return one.repeat(groups)


def masked_weights(model, name, pi, choices):
    """Parameters of the stock model with the masks on them, by name; norms get the factors and the epsilons of method.md, 3."""
    c, state = model.config, dict(model.named_parameters())
    moe = name == "nano3"

    def of(axis, layer):
        return pi.get((axis, layer), pi.get((axis, None)))

    hidden = mask(of("hidden", None), choices["hidden"], c.hidden_size)
    groups = c.n_groups if moe else c.mamba_n_groups
    heads, head_dim = (c.mamba_num_heads, c.mamba_head_dim) if moe else (c.mamba_n_heads, c.mamba_d_head)
    inner = heads * head_dim

    def share(axis, layer, size):
        p = of(axis, layer)
        if p is None:
            return 1.0, 1.0
        shares = [k / size for k in choices[axis]]
        return sum(q * s for q, s in zip(p, shares, strict=True)), sum(
            q * s**0.5 for q, s in zip(p, shares, strict=True)
        )

    epsilons = {}
    for key, tensor in list(state.items()):
        owner, _, leaf = key.rpartition(".")
        last = owner.rpartition(".")[2]
        layer = int(key.split(".")[2]) if ".layers." in key else None
        if last in ("embeddings", "embed_tokens"):
            tensor = tensor * hidden
        elif last in ("norm", "norm_f", "input_layernorm", "post_attention_layernorm"):
            gated = owner.endswith(("mixer.norm", "mamba.norm"))
            alive, root = (1.0, 1.0) if gated else share("hidden", None, c.hidden_size)
            if gated:
                for axis, size in (("mamba_heads", heads), ("mamba_head_dim", head_dim)):
                    own = share(axis, layer, size)
                    alive, root = alive * own[0], root * own[1]
            tensor, epsilons[owner] = tensor * root, alive
        elif last in ("in_proj", "conv1d") and (last == "in_proj" or leaf == "bias"):
            x = torch.ones(len(tensor))
            start = inner if last == "in_proj" else 0
            entries = torch.ones(heads)
            if of("mamba_heads", layer) is not None:
                entries = mask(of("mamba_heads", layer), choices["mamba_heads"], heads, groups)
            channels = torch.ones(head_dim)
            if of("mamba_head_dim", layer) is not None:
                channels = mask(of("mamba_head_dim", layer), choices["mamba_head_dim"], head_dim)
            x = torch.cat([x[:start], torch.outer(entries, channels).reshape(-1), x[start + inner :]])
            tensor = tensor * (x if leaf == "bias" else x[:, None])
        elif last in ("out_proj", "o_proj", "down_proj", "output_linear", "experts"):
            if leaf == "bias":
                tensor = tensor * hidden
            elif last == "experts" and leaf == "down_proj":
                count, size = tensor.shape[0], tensor.shape[2]
                tensor = tensor * hidden[None, :, None]
                tensor = tensor * mask(of("expert_ffn", layer), choices["expert_ffn"], size)
                experts = mask(of("experts", layer), choices["experts"], count, c.n_group if moe else 1)
                tensor = tensor * experts[:, None, None]
            elif last != "experts":
                tensor = tensor * hidden[:, None]
                if last == "o_proj":
                    number = c.num_attention_heads
                    along = mask(
                        of("attention_heads", layer), choices["attention_heads"], number, c.num_key_value_heads
                    )
                    tensor = tensor * along.repeat_interleave(tensor.shape[1] // number)
                elif last in ("down_proj", "output_linear"):
                    axis = "ffn" if owner.endswith("mixer.down_proj") else "shared_expert_ffn"
                    tensor = tensor * mask(of(axis, layer), choices[axis], tensor.shape[1])
        state[key] = tensor
    return state, epsilons


@pytest.mark.parametrize("name", PARENTS)
def test_a_mixture(name, ids):
    """Logits, and the gradients that reach the probabilities and the parent's weights."""
    model = elastify(build_parent(name), budgets={"some": {"hidden": 24}}, sort=False).train()
    router = BudgetRouter(config_of(model, name), {"half": 0.6}, per_layer=PER_LAYER)
    logits, pi = draw(router)
    units = SoftUnits(model, model.architecture)
    units.install(router.mixture(pi))
    ours = model(ids, labels=ids, use_cache=False)
    units.uninstall()

    keep = {
        layer: sum(p for p, count in zip(pi["layers", None], CHOICES[name]["layers"], strict=True) if rank < count)
        for rank, layer in enumerate(RANKING[name])
    }
    stock = build_parent(name).train()
    state, alive = masked_weights(stock, name, pi, CHOICES[name])
    for owner, factor in alive.items():
        module = stock.get_submodule(owner)
        module.variance_epsilon = module.variance_epsilon * factor

    def weigh(layer, module, args, output):
        return args[0] + keep[layer] * (output - args[0])

    for layer, module in enumerate(stock.model.layers):
        module.register_forward_hook(partial(weigh, layer))
    theirs = torch.func.functional_call(stock, state, (ids,), {"labels": ids, "use_cache": False})
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    leaves = list(logits.values())
    gradients = torch.autograd.grad(ours.loss, [*leaves, *model.parameters()], retain_graph=True)
    wanted = torch.autograd.grad(theirs.loss, [*leaves, *stock.parameters()])
    names = [*map(str, logits), *(key for key, _ in stock.named_parameters())]
    for key, mine, their in zip(names, gradients, wanted, strict=True):
        torch.testing.assert_close(mine, their, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
    assert all(gradient.abs().max() > 0 for gradient in gradients[: len(leaves)])


def test_between_two_budgets_the_one_hots_are_mixed(original):
    """Reference: the network on the mixed one-hot, by hand."""
    config = ElasticConfig.from_parent(original("nano2").config, {}, choices={"ffn": [40, 20], "hidden": [48, 24]})
    router = BudgetRouter(config, {"large": 0.8, "small": 0.6}, std=0.5)
    logits = router.logits(torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]))
    for (axis, _), found in logits.items():
        first, second = (router.networks[axis][i].weight for i in (0, 2))
        hidden = 0.25 * first[:, 1] + 0.75 * first[:, 2]
        torch.testing.assert_close(found[0], second @ torch.where(hidden > 0, hidden, 0.1 * hidden), **CLOSE)
        torch.testing.assert_close(found[1], router.logits("full")[axis, None], **CLOSE)
