"""Memory of a training run, from a config alone: what is kept is counted, what a step holds for a moment is estimated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from ..architectures import Architecture, get_architecture
from ..architectures.axes import TensorRule
from ..architectures.cost import CostModel
from ..errors import ElasticConfigError, shown
from .adapters import adaptable, factor_rules

Kind = Literal["full", "lora"]
KINDS: tuple[Kind, ...] = ("full", "lora")

_ARITHMETIC = torch.bfloat16
_LOGIT_COPIES = 4
"""Of the logits of a chunk: those of student and teacher, and what the loss makes of them."""


@dataclass(frozen=True)
class Part:
    """Memory that one thing takes on every GPU.

    Args:
        name (`str`): What it is.
        size (`int`): Bytes per GPU.
        counted (`bool`): Whether it is exact; otherwise it is estimated.
        how (`str`): The arithmetic, in words.
    """

    name: str
    size: int
    counted: bool
    how: str

    def to_dict(self) -> dict[str, Any]:
        return {"part": self.name, "bytes": self.size, "counted": self.counted, "how": self.how}


def training_memory(
    config: PreTrainedConfig,
    kind: Kind,
    *,
    dtype: torch.dtype = torch.bfloat16,
    length: int = 4096,
    rows: int = 1,
    gpus: int = 1,
    rank: int = 16,
    chunk: int = 1024,
    teacher: torch.dtype | None = None,
) -> list[Part]:
    """What [`hf_elastic.trainers.ElasticDistillationTrainer`] needs on every GPU for a parent, with AdamW and activation checkpointing.

    A step at a smaller budget needs less; every run has steps of the whole parent.

    Args:
        config (`PreTrainedConfig`): The parent's stock config.
        kind (`str`): `"full"` trains all weights, with a teacher beside them; `"lora"` adapters on every matrix of the
            layers that can have one, with the parent itself as the teacher.
        dtype (`torch.dtype`, *optional*): Of the weights. Arithmetic is in bfloat16.
        length (`int`, *optional*, defaults to 4096): Tokens of a row.
        rows (`int`, *optional*, defaults to 1): Rows that one GPU computes at a time.
        gpus (`int`, *optional*, defaults to 1): GPUs over which FSDP2 shards the weights.
        rank (`int`, *optional*, defaults to 16): Of the adapters.
        chunk (`int`, *optional*, defaults to 1024): `loss_chunk_size` of the run.
        teacher (`torch.dtype`, *optional*): Of the teacher of `"full"`. Defaults to `dtype`, as the run copies the model.

    Returns:
        `list[Part]`

    Raises:
        `ElasticConfigError`: a number that is not a whole number of at least 1, or another kind.
    """
    if kind not in KINDS:
        raise ElasticConfigError(f"training {shown(kind)} must be one of {', '.join(KINDS)}.")
    for name, value in {"length": length, "rows": rows, "gpus": gpus, "rank": rank, "chunk": chunk}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ElasticConfigError(f"{name}={shown(value)} must be a whole number of at least 1.")
    architecture = get_architecture(config.model_type)
    tokens = min(length, getattr(config, "max_position_embeddings", None) or length) * rows
    kept = (
        _full(config, dtype, teacher or dtype, gpus)
        if kind == "full"
        else _lora(architecture, config, dtype, gpus, rank)
    )
    return [*kept, *_step(architecture, config, kind, dtype, tokens, gpus, min(chunk, tokens))]


def _full(config: PreTrainedConfig, dtype: torch.dtype, teacher: torch.dtype, gpus: int) -> Iterator[Part]:
    cost = CostModel(config).full
    weights = cost.weight_bytes(dtype)
    named = str(dtype).removeprefix("torch.")
    yield Part("weights", weights // gpus, True, f"{cost.total_params:,} parameters in {named}")
    yield Part("gradients", weights // gpus, True, "as the weights")
    yield Part("AdamW", 2 * weights // gpus, True, "two moments, each as the weights")
    named = str(teacher).removeprefix("torch.")
    yield Part("teacher", cost.weight_bytes(teacher) // gpus, True, f"the frozen parent in {named}")


def _lora(
    architecture: Architecture, config: PreTrainedConfig, dtype: torch.dtype, gpus: int, rank: int
) -> Iterator[Part]:
    cost = CostModel(config).full
    named = str(dtype).removeprefix("torch.")
    count = adapter_parameters(architecture, config, rank)
    yield Part("weights", cost.weight_bytes(dtype) // gpus, True, f"{cost.total_params:,} parameters in {named}")
    how = f"{count:,} parameters of rank {rank}, float32, with gradients and AdamW: 16 bytes each"
    yield Part("adapter", 16 * count // gpus, True, how)


def adapter_parameters(architecture: Architecture, config: PreTrainedConfig, rank: int) -> int:
    """Parameters of adapters on every matrix of the layers that can have one, of experts too; routers are left out."""
    full = architecture.full(config)
    return sum(
        factor.count(full.at(rule.layer))
        for rule in architecture.rules(config)
        if adaptable(rule)
        for factor in factor_rules(rule, rank)
    )


def _is_matrix(rule: TensorRule) -> bool:
    return not rule.buffer and len(rule.dims) >= 2


def _step(
    architecture: Architecture,
    config: PreTrainedConfig,
    kind: Kind,
    dtype: torch.dtype,
    tokens: int,
    gpus: int,
    chunk: int,
) -> Iterator[Part]:
    full, depth, rules = architecture.full(config), architecture.depth(config), architecture.rules(config)
    layers = [[rule for rule in rules if rule.layer == layer] for layer in range(depth)]
    # FSDP casts what it gathers; on one GPU the residual stream has the type of the weights.
    item = _ARITHMETIC.itemsize if gpus > 1 else dtype.itemsize
    hidden = full.at(None)[architecture.stream]
    how = f"checkpoints: {depth} layers x {tokens:,} tokens x {hidden:,} channels x {item} bytes"
    yield Part("hidden states", depth * tokens * hidden * item, False, how)
    again = max(_recomputed(architecture, i, layer, full.at(i), config, tokens) for i, layer in enumerate(layers))
    yield Part(
        "one layer", again, False, "inputs and outputs of its matrices while it is computed again, and gradients"
    )
    vocabulary = config.vocab_size
    how = f"{_LOGIT_COPIES} x {chunk:,} tokens x {vocabulary:,} x 4 bytes"
    yield Part("logits", _LOGIT_COPIES * chunk * vocabulary * 4, False, how)
    largest = max(_elements(layer, full) for layer in layers)
    if gpus > 1:
        outside = sum(rule.count(full.at(None)) for rule in rules if rule.layer is None and not rule.copy_of)
        gathered = 3 * largest * _ARITHMETIC.itemsize + outside * _ARITHMETIC.itemsize
        yield Part(
            "gathered", gathered, False, "FSDP: two layers and gradients of one; embeddings and head of the teacher"
        )
    if kind == "lora" and (experts := max(_elements([r for r in layer if r.routed], full) for layer in layers)):
        how = "experts of one layer with the adapter folded in, and their gradients"
        yield Part("folded experts", 2 * experts * dtype.itemsize, False, how)


def _elements(rules: Sequence[TensorRule], full: Any) -> int:
    return sum(rule.count(full.at(rule.layer)) for rule in rules if not rule.copy_of)


def _recomputed(
    architecture: Architecture,
    layer: int,
    rules: Sequence[TensorRule],
    sizes: dict[str, int],
    config: PreTrainedConfig,
    tokens: int,
) -> int:
    """What a layer holds while it is computed again, twice for its gradients; Mamba as the stock code computes it without kernels."""
    widths = 0
    for rule in rules:
        if _is_matrix(rule) and rule.user in (None, rule.layer):
            used = sizes[architecture.per_token[rule.experts]] if rule.routed else 1
            widths += used * sum(rule.shape(sizes)[-2:])
    chunk = getattr(config, "chunk_size", None) or getattr(config, "mamba_chunk_size", None) or 0
    states = architecture.states(config.per_layer_config[layer], layer)
    inside = 3 * chunk * sum(state.dims[0].size(sizes) for state in states if state.kind == "ssm") * 4
    return 2 * tokens * (widths * _ARITHMETIC.itemsize + inside)


def training_flops(
    config: PreTrainedConfig, kind: Kind, active_params: Sequence[int], probabilities: Sequence[float] | None = None
) -> int:
    """Floating-point operations per token: 2 per active parameter and pass.

    The student has a forward pass, the same again from checkpoints, and a backward pass that counts twice in a full run and once with
    adapters; the teacher has one forward pass of the whole parent. Attention over the context is left out.

    Args:
        active_params (`list[int]`): Of every size that is drawn.
        probabilities (`list[float]`, *optional*): How often; all alike by default.
    """
    odds = probabilities or [1 / len(active_params)] * len(active_params)
    student = math.fsum(p * n for p, n in zip(odds, active_params, strict=True))
    passes = 4 if kind == "full" else 3
    return round(2 * (passes * student + CostModel(config).full.active_params))
