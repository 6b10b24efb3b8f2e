"""Rules of the blocks that hybrid architectures share: Mamba-2 mixers, attention and gateless MLPs.

Prefixes hold `{layer}`; rules come with their layer set.
"""

from __future__ import annotations

from collections.abc import Iterator

from .axes import Cut, Dim, TensorRule, dim
from .base import StateRule

HIDDEN = dim(Cut("hidden"))
"""The residual stream where it is read."""

RESIDUAL = dim(Cut("hidden", gated=True))
"""The residual stream where it is written: by embeddings and by every matrix that leads back to it."""


def linear(prefix: str, layer: int | None, out: Dim, inp: Dim, *, bias: bool = False) -> Iterator[TensorRule]:
    """`nn.Linear`: weight `[out, in]` and, if there is one, bias `[out]`."""
    yield TensorRule(f"{prefix}.weight", (out, inp), layer)
    if bias:
        yield TensorRule(f"{prefix}.bias", (out,), layer)


def mamba2(
    prefix: str, layer: int, *, groups: int, state: int, kernel: int, conv_bias: bool, proj_bias: bool
) -> Iterator[TensorRule]:
    """Mamba-2 mixer. B, C and the gated norm are per group, so a head is kept with its group (arXiv 2504.11409)."""
    heads, head_dim = Cut("mamba_heads", groups=groups), Cut("mamba_head_dim")
    inner, shared, per_head = (groups, heads, head_dim), (groups, state), (groups, heads)
    # Undecided heads and channels are weighted in x, and in the bias that the convolution adds to it; the scan is linear in x.
    x = (groups, Cut("mamba_heads", groups=groups, gated=True), Cut("mamba_head_dim", gated=True))
    conv, conv_add = dim(x=inner, B=shared, C=shared), dim(x=x, B=shared, C=shared)
    in_proj = dim(z=inner, x=x, B=shared, C=shared, dt=per_head)
    yield from linear(f"{prefix}.in_proj", layer, in_proj, HIDDEN, bias=proj_bias)
    yield TensorRule(f"{prefix}.conv1d.weight", (conv, dim(1), dim(kernel)), layer)
    if conv_bias:
        yield TensorRule(f"{prefix}.conv1d.bias", (conv_add,), layer)
    for name in ("dt_bias", "A_log", "D"):
        yield TensorRule(f"{prefix}.{name}", (dim(*per_head),), layer)
    yield TensorRule(f"{prefix}.norm.weight", (dim(*inner),), layer, norm=True)
    yield from linear(f"{prefix}.out_proj", layer, RESIDUAL, dim(*inner), bias=proj_bias)


def mamba2_states(*, groups: int, state: int, kernel: int) -> tuple[StateRule, ...]:
    """Convolution window over x, B and C, `[x + B + C, kernel]`, and one `head_dim x state` matrix per head, the sum of B times x."""
    heads, head_dim = Cut("mamba_heads", groups=groups), Cut("mamba_head_dim")
    conv = dim(x=(groups, heads, head_dim), B=(groups, state), C=(groups, state))
    return (
        StateRule("conv", (conv, dim(kernel)), degree=0.5),
        StateRule("ssm", (dim(groups, heads), dim(head_dim), dim(state)), degree=1.0),
    )


def attention(prefix: str, layer: int, *, kv_heads: int, head_dim: int, bias: bool) -> Iterator[TensorRule]:
    """Grouped-query attention: query heads are cut inside their KV group, KV heads stay."""
    query = dim(kv_heads, Cut("attention_heads", groups=kv_heads), head_dim)
    key = dim(kv_heads, head_dim)
    for name, out in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        yield from linear(f"{prefix}.{name}", layer, out, HIDDEN, bias=bias)
    heads = dim(kv_heads, Cut("attention_heads", groups=kv_heads, gated=True), head_dim)
    yield from linear(f"{prefix}.o_proj", layer, RESIDUAL, heads, bias=bias)


def attention_states(*, kv_heads: int, head_dim: int) -> tuple[StateRule, ...]:
    """Keys and values of every token."""
    dims = (dim(kv_heads), dim(head_dim))
    return StateRule("keys", dims, degree=0.5), StateRule("values", dims, degree=0.5)


def rms_norm(prefix: str, layer: int | None) -> TensorRule:
    return TensorRule(f"{prefix}.weight", (HIDDEN,), layer, norm=True)
