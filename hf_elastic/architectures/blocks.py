"""Rules of the blocks that hybrid architectures share: Mamba-2 mixers, attention and gateless MLPs.

Prefixes hold `{layer}`; rules come with their layer set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..errors import ElasticConfigError
from .axes import Cut, Dim, Norm, Sizes, TensorRule, dim
from .base import StateRule

HIDDEN = dim(Cut("hidden"))
"""The residual stream where it is read."""

RESIDUAL = dim(Cut("hidden", gated=True))
"""The residual stream where it is written: by embeddings and by every matrix that leads back to it."""

_QKV: dict[str, Any] = {"kind": "attention", "fused": "qkv_proj"}

BESIDE_EMBEDDINGS = dim(h=(Cut("hidden"),), e=(Cut("hidden"),))
"""The residual stream and the embeddings beside it, where a block reads both."""


def linear(
    prefix: str, layer: int | None, out: Dim, inp: Dim, *, bias: bool = False, **facts: Any
) -> Iterator[TensorRule]:
    """`nn.Linear`: weight `[out, in]`, of which further facts may be known (`TensorRule`), and, if there is one, bias `[out]`."""
    yield TensorRule(f"{prefix}.weight", (out, inp), layer, **facts)
    if bias:
        yield TensorRule(f"{prefix}.bias", (out,), layer)


def convolution(prefix: str, layer: int, channels: Dim, kernel: int, disk: str | None = None) -> TensorRule:
    """Weight of a causal convolution of every channel by itself, which stock code hands to a kernel."""
    dims = (channels, dim(1), dim(kernel))
    return TensorRule(f"{prefix}.weight", dims, layer, disk=disk, passed_by_kernels=True)


def mamba2(
    prefix: str,
    layer: int,
    *,
    groups: int,
    state: int,
    kernel: int,
    conv_bias: bool,
    proj_bias: bool,
    out_bias: bool | None = None,
    norm: bool = True,
) -> Iterator[TensorRule]:
    """Mamba-2 mixer. B, C and the gated norm are per group, so a head is kept with its group (arXiv 2504.11409).

    `out_bias` says whether `out_proj` has a bias where `in_proj` says nothing about it, and `norm` whether the gate has a norm.
    """
    heads, head_dim = Cut("mamba_heads", groups=groups), Cut("mamba_head_dim")
    inner, shared, per_head = (groups, heads, head_dim), (groups, state), (groups, heads)
    # Undecided heads and channels are weighted in x, and in the bias that the convolution adds to it; the scan is linear in x.
    x = (groups, Cut("mamba_heads", groups=groups, gated=True), Cut("mamba_head_dim", gated=True))
    conv, conv_add = dim(x=inner, B=shared, C=shared), dim(x=x, B=shared, C=shared)
    in_proj = dim(z=inner, x=x, B=shared, C=shared, dt=per_head)
    yield from linear(f"{prefix}.in_proj", layer, in_proj, HIDDEN, bias=proj_bias, measured="x", kind="mamba")
    yield convolution(f"{prefix}.conv1d", layer, conv, kernel)
    if conv_bias:
        yield TensorRule(f"{prefix}.conv1d.bias", (conv_add,), layer)
    for name in ("dt_bias", "A_log", "D"):
        yield TensorRule(f"{prefix}.{name}", (dim(*per_head),), layer)
    if norm:
        yield TensorRule(f"{prefix}.norm.weight", (dim(*inner),), layer, norm=True)
    # One kernel takes the scan, the norm and this matrix together.
    out = {"bias": proj_bias if out_bias is None else out_bias, "passed_by_kernels": True}
    yield from linear(f"{prefix}.out_proj", layer, RESIDUAL, dim(*inner), **out, kind="mamba")


def mamba1(
    prefix: str,
    layer: int,
    channels: Cut,
    *,
    rank: int,
    state: int,
    kernel: int,
    conv_bias: bool,
    proj_bias: bool,
) -> Iterator[TensorRule]:
    """Mamba-1 mixer: every channel has a state of its own, and all together choose its step, B and C."""
    inner, x = dim(channels), replace(channels, gated=True)
    yield from linear(f"{prefix}.in_proj", layer, dim(x=(x,), z=(channels,)), HIDDEN, bias=proj_bias, kind="mamba")
    yield convolution(f"{prefix}.conv1d", layer, inner, kernel)
    if conv_bias:
        yield TensorRule(f"{prefix}.conv1d.bias", (dim(x),), layer)
    yield from linear(f"{prefix}.x_proj", layer, dim(dt=(rank,), B=(state,), C=(state,)), inner)
    yield from linear(f"{prefix}.dt_proj", layer, inner, dim(rank), bias=True, passed_by_kernels=True)
    yield TensorRule(f"{prefix}.A_log", (inner, dim(state)), layer)
    yield TensorRule(f"{prefix}.D", (inner,), layer)
    yield from linear(f"{prefix}.out_proj", layer, RESIDUAL, inner, bias=proj_bias, kind="mamba")


def mamba1_states(channels: Cut, *, state: int, kernel: int, degree: float) -> tuple[StateRule, ...]:
    """Convolution window over x, and one vector per channel, the sum of B times x."""
    return StateRule("conv", (dim(channels), dim(kernel)), 0.5), StateRule("ssm", (dim(channels), dim(state)), degree)


def mamba2_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """What no axis cuts of a Mamba-2 mixer, by the names that Bamba, Granite and Falcon-H1 share."""
    return {"groups": config.mamba_n_groups, "state": config.mamba_d_state, "kernel": config.mamba_d_conv}


def mamba_expand(sizes: Sizes) -> int:
    """Mamba's inner width as a multiple of `hidden`, for stock configs that say it so.

    Raises:
        `ElasticConfigError`: it is none.
    """
    heads, head_dim, hidden = (sizes[axis] for axis in ("mamba_heads", "mamba_head_dim", "hidden"))
    if heads * head_dim % hidden:
        raise ElasticConfigError(
            f"mamba_heads={heads} * mamba_head_dim={head_dim} = {heads * head_dim} is no whole multiple of hidden={hidden}, and it says Mamba's "
            "width as one (mamba_expand); cut them together so that hidden divides the product"
        )
    return heads * head_dim // hidden


def idle_mamba(config: PreTrainedConfig, hidden: int) -> dict[str, int]:
    """Mamba sizes that fit `hidden`, for a stock config that checks them where no layer has Mamba, too."""
    some = config.per_layer_config[0]
    inner = some.mamba_expand * hidden
    heads = math.gcd(some.mamba_n_heads, inner)
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_n_groups": math.gcd(some.mamba_n_groups, heads),
    }


def mamba2_states(*, groups: int, state: int, kernel: int) -> tuple[StateRule, ...]:
    """Convolution window over x, B and C, `[x + B + C, kernel]`, and one `head_dim x state` matrix per head, the sum of B times x."""
    heads, head_dim = Cut("mamba_heads", groups=groups), Cut("mamba_head_dim")
    conv = dim(x=(groups, heads, head_dim), B=(groups, state), C=(groups, state))
    return (
        StateRule("conv", (conv, dim(kernel)), degree=0.5),
        StateRule("ssm", (dim(groups, heads), dim(head_dim), dim(state)), degree=1.0),
    )


def head_dim(config: PreTrainedConfig) -> int:
    """Width of an attention head, also where a stock config leaves it to be computed."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention(
    prefix: str,
    layer: int,
    *,
    kv_heads: int,
    head_dim: int,
    bias: bool,
    out_bias: bool | None = None,
    out: str = "o_proj",
) -> Iterator[TensorRule]:
    """Grouped-query attention: query heads are cut inside their KV group, KV heads stay. `out_bias`, if it is not `bias`: of the output."""
    query = dim(kv_heads, Cut("attention_heads", groups=kv_heads), head_dim)
    key = dim(kv_heads, head_dim)
    for name, along in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        yield from linear(f"{prefix}.{name}", layer, along, HIDDEN, bias=bias, **_QKV)
    heads = dim(kv_heads, Cut("attention_heads", groups=kv_heads, gated=True), head_dim)
    bias = bias if out_bias is None else out_bias
    yield from linear(f"{prefix}.{out}", layer, RESIDUAL, heads, bias=bias, kind="attention")


def short_convolution(prefix: str, layer: int, *, kernel: int, bias: bool) -> Iterator[TensorRule]:
    """`out(C * conv(B * x))`. Its channels are as many as those of the residual stream, and nothing but their number ties them to it."""
    inner, x = Cut("hidden", order="conv_channels"), Cut("hidden", order="conv_channels", gated=True)
    kind = "short_convolution"
    yield from linear(f"{prefix}.in_proj", layer, dim(B=(inner,), C=(inner,), x=(x,)), HIDDEN, bias=bias, kind=kind)
    yield convolution(f"{prefix}.conv", layer, dim(inner), kernel)
    if bias:
        yield TensorRule(f"{prefix}.conv.bias", (dim(x),), layer)
    yield from linear(f"{prefix}.out_proj", layer, RESIDUAL, dim(inner), bias=bias, kind=kind)


def short_convolution_states(*, kernel: int) -> tuple[StateRule, ...]:
    """The window over B * x, a product of two that are linear in the normalised hidden state."""
    return (StateRule("conv", (dim(Cut("hidden", order="conv_channels")), dim(kernel)), degree=1.0),)


def kv_heads_attention(prefix: str, layer: int, *, queries: int, head_dim: int, inp: Dim) -> Iterator[TensorRule]:
    """Attention that is cut by its KV heads, each with the `queries` query heads that it has."""
    query, key = kv_heads_dims(queries, head_dim)
    for name, out in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        yield from linear(f"{prefix}.{name}", layer, out, inp, **_QKV)
    inner = dim(Cut("kv_heads", gated=True), queries, head_dim)
    yield from linear(f"{prefix}.o_proj", layer, RESIDUAL, inner, kind="attention")


def kv_heads_dims(queries: int, head_dim: int) -> tuple[Dim, Dim]:
    """What runs along its queries, and along its keys and values."""
    return dim(Cut("kv_heads"), queries, head_dim), dim(Cut("kv_heads"), head_dim)


def attention_states(
    *, kv_heads: int | Cut, head_dim: int, window: int | None = None, normed: bool = False
) -> tuple[StateRule, ...]:
    """Keys and values of every token, or of those in a sliding window.

    `normed`: keys go through a norm of their own, and so are of one size at every width.
    """
    dims = (dim(kv_heads), dim(head_dim))
    return StateRule("keys", dims, 0.0 if normed else 0.5, window=window), StateRule(
        "values", dims, 0.5, window=window
    )


def sliding_window(config: PreTrainedConfig, layer: int) -> int | None:
    """The window of a layer's attention, told as upstream's cache tells it: all layers have it where their kinds are not listed."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(config.per_layer_config[layer], "sliding_window", None)


def rms_norm(prefix: str, layer: int | None, *, centre: float = 0.0) -> TensorRule:
    """An RMSNorm over the residual stream."""
    return TensorRule(f"{prefix}.weight", (HIDDEN,), layer, norm=Norm(centre))


def trunk(config: PreTrainedConfig, norm: TensorRule, embeddings: str = "model.embed_tokens") -> list[TensorRule]:
    """What belongs to no layer: embeddings, final norm, and the head, which may be tied."""
    vocab, name = dim(config.vocab_size), f"{embeddings}.weight"
    head = TensorRule("lm_head.weight", (vocab, HIDDEN), tied=name if config.tie_word_embeddings else None)
    return [TensorRule(name, (vocab, RESIDUAL)), norm, head]


def gated_mlp(
    prefix: str,
    layer: int,
    axis: str,
    *,
    bias: bool = False,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    times: int = 1,
    order: str | None = None,
) -> Iterator[TensorRule]:
    """`down(act(gate(x)) * up(x))`, three linear layers, `times` as wide as the axis, in an `order` of their own if only that ties them to it."""
    *ups, down = names
    kind, inner = _mlp_kind(order or axis), dim(Cut(axis, times=times, order=order))
    for name in ups:
        yield from linear(f"{prefix}.{name}", layer, inner, HIDDEN, bias=bias, kind=kind, fused="gate_up_proj")
    out = dim(Cut(axis, gated=True, times=times, order=order))
    yield from linear(f"{prefix}.{down}", layer, RESIDUAL, out, bias=bias, kind=kind)


def fused_mlp(
    prefix: str,
    layer: int,
    axis: str,
    *,
    bias: bool = False,
    names: tuple[str, str] = ("gate_up_proj", "down_proj"),
) -> Iterator[TensorRule]:
    """`down(act(gate(x)) * up(x))`, gate and up in one matrix."""
    both, (joined, down) = dim(gate=(Cut(axis),), up=(Cut(axis),)), names
    yield from linear(f"{prefix}.{joined}", layer, both, HIDDEN, bias=bias, kind=_mlp_kind(axis))
    yield from linear(f"{prefix}.{down}", layer, RESIDUAL, dim(Cut(axis, gated=True)), bias=bias, kind=_mlp_kind(axis))


def low_rank(prefix: str, layer: int, rank: int, out: Dim, inp: Dim) -> Iterator[TensorRule]:
    """Two linear layers, one after the other, with `rank` channels between them."""
    yield from linear(f"{prefix}.0", layer, dim(rank), inp)
    yield from linear(f"{prefix}.1", layer, out, dim(rank))


def gateless_mlp(prefix: str, layer: int, axis: str, *, bias: bool) -> Iterator[TensorRule]:
    """`down(act(up(x)))`, two linear layers."""
    kind = _mlp_kind(axis)
    yield from linear(f"{prefix}.up_proj", layer, dim(Cut(axis)), HIDDEN, bias=bias, kind=kind)
    yield from linear(f"{prefix}.down_proj", layer, RESIDUAL, dim(Cut(axis, gated=True)), bias=bias, kind=kind)


def _mlp_kind(axis: str) -> str:
    return "shared_experts" if axis.startswith("shared_expert") else "mlp"


def experts(
    prefix: str,
    layer: int,
    *,
    router: str = "gate",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    groups: int = 1,
    stored: str | None = None,
) -> Iterator[TensorRule]:
    """Routed experts with a fused gate and up, stored one by one on disk (below `stored`, if it is not `prefix`), and their router.

    The router may choose among `groups` of experts first.
    """
    ffn, stored = (Cut("expert_ffn", within="experts"),), stored or prefix
    disk = f"{stored}.experts.{{expert}}"
    rows, rows_out = (dim(groups, Cut("experts", groups=groups, gated=gated)) for gated in (False, True))
    *ups, down = names
    dims = (rows, dim(**dict.fromkeys(ups, ffn)), HIDDEN)
    facts: dict[str, Any] = {"routed": True, "kind": "experts"}
    yield TensorRule(f"{prefix}.experts.gate_up_proj", dims, layer, disk=f"{disk}.{{segment}}.weight", **facts)
    out = (rows_out, RESIDUAL, dim(Cut("expert_ffn", within="experts", gated=True)))
    yield TensorRule(f"{prefix}.experts.down_proj", out, layer, disk=f"{disk}.{down}.weight", **facts)
    yield TensorRule(f"{prefix}.{router}.weight", (rows, HIDDEN), layer, disk=f"{stored}.{router}.weight", routes=True)


def check_router_groups(sizes: Sizes, groups: int, chosen: int, where: str) -> None:
    """Raise [`ElasticConfigError`] for experts that a router which chooses `chosen` of some groups first cannot have."""
    per_group = sizes["experts"] // groups
    if per_group < 2:
        raise ElasticConfigError(
            f"{where}: experts={sizes['experts']} leaves {per_group} expert in each of {groups} router groups; the "
            f"router adds the two best of a group, so keep at least {2 * groups}."
        )
    if sizes["experts_per_token"] > chosen * per_group:
        raise ElasticConfigError(
            f"{where}: experts_per_token={sizes['experts_per_token']} is more than the {chosen * per_group} experts "
            f"in the {chosen} router groups a token may use; lower it or keep more experts."
        )


def bias_softmax_router(router: Any, bias: torch.Tensor, top_k: int, *, normalized: bool) -> None:
    """Let a router that takes the softmax of its logits choose with a bias."""

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
        weights, index = torch.softmax(logits.float() + bias, dim=-1).topk(top_k, dim=-1)
        if normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(logits.dtype), index

    router.forward = forward


def head_norms(
    prefix: str, layer: int, head_dim: int, names: tuple[str, str] = ("q_norm", "k_norm")
) -> list[TensorRule]:
    """Norms of every query and key by itself, along what no axis cuts."""
    return [TensorRule(f"{prefix}.{name}.weight", (dim(head_dim),), layer) for name in names]


def gated_attention(prefix: str, layer: int, *, kv_heads: int, head_dim: int, bias: bool) -> Iterator[TensorRule]:
    """Attention whose `q_proj` gives query and output gate, head by head."""
    query = dim(kv_heads, Cut("attention_heads", groups=kv_heads), 2 * head_dim)
    for rule in attention(prefix, layer, kv_heads=kv_heads, head_dim=head_dim, bias=bias):
        yield replace(rule, dims=(query, *rule.dims[1:])) if ".q_proj." in rule.template else rule


def delta_net(prefix: str, layer: int, *, keys: int, key_dim: int, kernel: int, joined: bool) -> Iterator[TensorRule]:
    """Gated DeltaNet: value heads are cut inside their key head. `joined`: two input projections, key head by key head, instead of four."""
    heads, head_dim = Cut("value_heads", groups=keys), Cut("value_head_dim")
    v, z, qk = (
        (heads, Cut("value_head_dim", gated=True)),
        (heads, head_dim),
        {"q": (keys, key_dim), "k": (keys, key_dim)},
    )
    if joined:
        outs = {
            "qkvz": dim(keys, dim(q=(key_dim,), k=(key_dim,), v=v, z=z)),
            "ba": dim(keys, dim(b=(heads,), a=(heads,))),
        }
    else:
        outs = {"qkv": dim(**qk, v=(keys, *v)), "z": dim(keys, *z), "b": dim(keys, heads), "a": dim(keys, heads)}
    for name, out in outs.items():
        fused = "in_proj_qkvz" if name in ("qkv", "z") else None
        kind = "linear_attention" if fused or name == "qkvz" else None  # the others say how far heads decay and learn
        yield from linear(f"{prefix}.in_proj_{name}", layer, out, HIDDEN, kind=kind, fused=fused)
    yield convolution(f"{prefix}.conv1d", layer, dim(**qk, v=(keys, *z)), kernel)
    for name in ("dt_bias", "A_log"):
        yield TensorRule(f"{prefix}.{name}", (dim(keys, heads),), layer)
    yield TensorRule(f"{prefix}.norm.weight", (dim(head_dim),), layer, norm=True)  # of every head by itself
    out = dim(keys, Cut("value_heads", groups=keys, gated=True), head_dim)
    yield from linear(f"{prefix}.out_proj", layer, RESIDUAL, out, kind="linear_attention")


def delta_net_states(*, keys: int, key_dim: int, kernel: int) -> tuple[StateRule, ...]:
    """Convolution window over queries, keys and values, and one matrix per value head: of keys, which are normalised, and values after a SiLU.

    Measured: windows 0.5, matrices 0.5 to 0.8 in random models, the more the larger the activations, and 0.6 in a small one that was trained at
    four widths. There, what a hand-over loses is the same within 0.002 nats for every degree from 0.25 to 1.
    """
    heads, head_dim = Cut("value_heads", groups=keys), Cut("value_head_dim")
    conv = dim(q=(keys, key_dim), k=(keys, key_dim), v=(keys, heads, head_dim))
    ssm = (dim(keys, heads), dim(key_dim), dim(head_dim))
    return StateRule("conv", (conv, dim(kernel)), 0.5), StateRule("ssm", ssm, 0.7)
