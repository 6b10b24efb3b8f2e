"""Importance of every entry of every axis, from forward passes over calibration text (arXiv 2511.16664, eq. 1-5).

| axis | score | eq. |
|---|---|---|
| `hidden` | sum over norms, batch and positions of `abs(LN(X))` | A 1 |
| `ffn`, `shared_expert_ffn`, `expert_ffn` | sum over batch and positions of the magnitude of the second matrix's input | A 2, after the activation |
| `mamba_head_dim` | `norm2(s[:, d])` over all heads, `s = LN(X) W_x^T` | A 3 |
| `mamba_heads` | `norm2(s[h, top channels])`, ranked inside each group | A 4 |
| `attention_heads` | sum of the head's L2 norm at the output projection, ranked inside each KV group | |
| `experts` | REAP: mean over the tokens routed to j of `g_j(x) * norm2(f_j(x))` | arXiv 2510.13999 |
| `layers` | normalised squared error of the logits without the layer, removing the least important one after another | A 5 |

Which module to listen to follows from the table: a norm over `hidden`, the linear layer that leads from an axis back to `hidden`,
the `x` segment of Mamba's input projection.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..architectures import Architecture, get_architecture
from ..architectures.axes import TensorRule
from ..architectures.submodel import LAYERS
from ..checkpoints.loading import checked_parent
from ..checkpoints.replacing import replacing_file
from ..errors import CheckpointError, ElasticConfigError, shown
from .calibration import batches_of

MAMBA = "mamba_channels"
"""Key of the second moments of Mamba's x, of shape `(heads, head_dim)`: both Mamba axes are scored from them."""

_MAMBA_AXES = ("mamba_heads", "mamba_head_dim")
_CONSUMED = ("ffn", "shared_expert_ffn", "attention_heads")


@dataclass
class Scores:
    """Importance scores of a parent; higher is kept longer.

    Args:
        values (`dict[str, dict[int, torch.Tensor]]`):
            Per axis and layer (-1 for global axes) float64 scores: `(size,)`, or `(groups, size per group)` for attention heads,
            `(heads, head_dim)` for [`MAMBA`], `(experts, expert_ffn)` for the neurons of experts.
        layers (`list[tuple[int, float]]`): Layers in the order in which they are removed (least important first), with eq. A 5.
        info (`dict`): `model_type`, `samples` and `tokens` that were seen.
    """

    values: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    layers: list[tuple[int, float]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    def has(self, axis: str) -> bool:
        """Whether an axis was scored. The number of experts per token needs no score: the router ranks them itself."""
        if axis == LAYERS:
            return bool(self.layers)
        return axis == "experts_per_token" or (MAMBA if axis in _MAMBA_AXES else axis) in self.values

    @property
    def layer_ranking(self) -> list[int]:
        """All layers, most important first."""
        return [layer for layer, _ in reversed(self.layers)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            `CheckpointError`: the disk is full.
        """
        tensors = {
            f"{axis}.{layer}": t.contiguous() for axis, layers in self.values.items() for layer, t in layers.items()
        }
        with replacing_file(path) as file:
            save_file(tensors, file, {"info": json.dumps(self.info), "layers": json.dumps(self.layers)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote.

        Raises:
            `CheckpointError`: the file is missing, damaged, or holds something else.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                scores = cls(
                    {}, [(int(i), float(s)) for i, s in json.loads(metadata["layers"])], json.loads(metadata["info"])
                )
                for key in file.keys():  # noqa: SIM118 - not a dict
                    axis, _, layer = key.rpartition(".")
                    scores.values.setdefault(axis, {})[int(layer)] = file.get_tensor(key)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} holds no scores written by Scores.save ({error}).") from error
        return scores


def score(
    model: PreTrainedModel,
    calibration: Iterable[Mapping[str, Any]],
    *,
    axes: Sequence[str] | None = None,
    batch_size: int = 8,
    samples: int = 1024,
    max_length: int | None = None,
    depth_samples: int = 64,
    tokenizer: Any = None,
    progress: bool = True,
) -> Scores:
    """Score a parent on calibration text.

    Args:
        model (`PreTrainedModel`): Stock causal model; it is not changed.
        calibration (`datasets.Dataset` or iterable of dicts):
            Rows with `input_ids` (and `attention_mask`), or with `text` or `messages` if a tokenizer is given. A streaming dataset is read
            once, for the first `samples` rows. Rows without tokens are passed over. Batches, such as a `DataLoader` gives, and plain tensors of
            token ids are taken apart into their rows.
        axes (`list[str]`, *optional*): Which axes to score; defaults to all the parent has, but for `layers`, which takes many more passes.
        batch_size (`int`, *optional*, defaults to 8): Rows per forward pass.
        samples (`int`, *optional*, defaults to 1024): Rows to read (the papers use 1024 of 8192 tokens).
        max_length (`int`, *optional*): Cut rows to this many tokens.
        depth_samples (`int`, *optional*, defaults to 64): Rows for ranking layers, which takes a pass per pair of layers.
        tokenizer (*optional*): For rows of text.
        progress (`bool`, *optional*, defaults to `True`): Show progress bars.

    Returns:
        [`Scores`]

    Raises:
        `ElasticConfigError`: unknown axis, no rows, or rows without a column that can be read.
        `TokenizerError`: a row that the tokenizer has no tokens for.
    """
    model = checked_parent(model)
    architecture = get_architecture(model.config.model_type)
    available = [axis.name for axis in architecture.available_axes(model.config)]
    wanted = list(axes) if axes is not None else available
    for name in wanted:
        if name != LAYERS:
            architecture.axis(name)
    counts = {"batch_size": batch_size, "samples": samples, "depth_samples": depth_samples, "max_length": max_length}
    for name, count in counts.items():
        if not (name == "max_length" and count is None or type(count) is int and count > 0):
            raise ElasticConfigError(f"{name}={shown(count)} must be a whole number of at least 1.")
    if isinstance(calibration, (str, Mapping)) or not isinstance(calibration, Iterable):
        raise ElasticConfigError(
            f"calibration must be a datasets.Dataset or an iterable of rows, which a {type(calibration).__name__} is not."
        )
    batches = list(batches_of(calibration, batch_size, samples, max_length, tokenizer))
    if not batches:
        raise ElasticConfigError("calibration has no rows with tokens; give at least one with input_ids.")
    largest, vocabulary = max(int(batch["input_ids"].max()) for batch in batches), model.config.vocab_size
    if (smallest := min(int(batch["input_ids"].min()) for batch in batches)) < 0:
        raise ElasticConfigError(
            f"calibration has token {smallest}; tokens are 0 or more, and padding is left out by attention_mask."
        )
    if largest >= vocabulary:
        raise ElasticConfigError(
            f"calibration has token {largest}, the parent's vocabulary has {vocabulary}; tokenize with the parent's own tokenizer."
        )
    listener = _Listener(architecture, model, set(wanted))
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), listener.attached():
            for batch in tqdm(batches, desc="Scoring", disable=not progress):
                listener.mask = batch["attention_mask"].bool().to(model.device)
                model(**{key: tensor.to(model.device) for key, tensor in batch.items()}, use_cache=False)
        scores = listener.scores()
        _refuse_infinite(scores)
        if LAYERS in wanted:
            few = batches[: max(1, -(-depth_samples // batch_size))]
            scores.layers = rank_layers(model, few, progress=progress)
    finally:
        model.train(training)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    scores.info = {"model_type": architecture.model_type, "samples": rows, "tokens": tokens}
    return scores


def rank_layers(
    model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]], *, progress: bool = True
) -> list[tuple[int, float]]:
    """Remove one layer after another, always the one whose absence changes the logits least (eq. A 5).

    Args:
        model (`PreTrainedModel`): Stock causal model in evaluation mode.
        batches: Calibration batches; each is run once per pair of layers.

    Returns:
        `list[tuple[int, float]]`: Every layer in the order of removal, with `sum (M_full - M_without)^2 / sum M_full^2` over the real tokens
        when it and all layers before it are gone.
    """
    layers = get_architecture(model.config.model_type).layers_of(model)
    removed: list[tuple[int, float]] = []
    rounds = len(layers) * (len(layers) + 1) // 2
    with torch.no_grad(), tqdm(total=rounds, desc="Ranking layers", disable=not progress) as bar:
        while len(removed) < len(layers):
            gone = [layer for layer, _ in removed]
            errors: dict[int, float] = {}
            for candidate in set(range(len(layers))) - set(gone):
                errors[candidate] = _logit_error(model, layers, [*gone, candidate], batches)
                bar.update()
            least = min(errors, key=lambda layer: (errors[layer], -layer))
            removed.append((least, errors[least]))
    return removed


def _logit_error(
    model: PreTrainedModel, layers: nn.ModuleList, gone: Sequence[int], batches: Sequence[Mapping[str, torch.Tensor]]
) -> float:
    error = norm = 0.0
    for batch in batches:
        inputs = {key: tensor.to(model.device) for key, tensor in batch.items()}
        real = inputs["attention_mask"].bool()
        full = model(**inputs, use_cache=False).logits[real].float()
        with _without(layers, gone):
            cut = model(**inputs, use_cache=False).logits[real].float()
        error += float((full - cut).square().sum(dtype=torch.float64))
        norm += float(full.square().sum(dtype=torch.float64))
    return error / norm


@contextmanager
def _without(layers: nn.ModuleList, gone: Sequence[int]) -> Iterator[None]:
    """Let the layers pass their input on."""
    try:
        for layer in gone:
            layers[layer].forward = lambda hidden_states, *args, **kwargs: hidden_states
        yield
    finally:
        for layer in gone:
            layers[layer].__dict__.pop("forward", None)


def _refuse_infinite(scores: Scores) -> None:
    for axis, layers in scores.values.items():
        for layer, values in layers.items():
            if not values.isfinite().all():
                raise ElasticConfigError(
                    f"the scores of {axis}{'' if layer < 0 else f' in layer {layer}'} are not finite: the parent computes infinite values or NaN on "
                    "this text. Score it in another dtype, such as bfloat16 or float32, and check that its weights are whole."
                )


class _Listener:
    """Adds up scores from forward hooks; `mask` says which positions of the current batch are real, `(B, T)`."""

    def __init__(self, architecture: Architecture, model: PreTrainedModel, wanted: set[str]):
        self.mask = torch.ones(0, 0, dtype=torch.bool)
        self._sums: dict[str, dict[int, torch.Tensor]] = {}
        self._routed: dict[int, torch.Tensor] = {}  # tokens per expert, (E,)
        self._hooks: list[tuple[nn.Module, Callable[..., None], bool]] = []
        full = architecture.full(model.config)
        seen: set[str] = set()
        for rule in architecture.rules(model.config):
            sizes = full.at(rule.layer)
            module = model.get_submodule(rule.module)
            if "hidden" in wanted and rule.norm and [cut.axis for cut in rule.dims[0].cuts] == ["hidden"]:
                self._listen(module, lambda m, i, out: self._add("hidden", -1, out.abs()))
            elif (axis := _consumed_axis(rule, wanted)) is not None:
                groups = rule.dims[1].segments[0][1][0] if axis == "attention_heads" else 1
                self._listen(module, self._on_input(axis, rule.layer, sizes[axis], groups), before=True)
            elif (
                wanted & set(_MAMBA_AXES)
                and rule.dims
                and "x" in dict(rule.dims[0].segments)
                and rule.name.endswith("in_proj.weight")
            ):
                span = rule.dims[0].span("x", sizes)
                shape = (sizes["mamba_heads"], sizes["mamba_head_dim"])
                self._listen(module, self._on_mamba(rule.layer, span, shape))
            elif rule.routed and wanted & {"experts", "expert_ffn"} and rule.module not in seen:
                seen.add(rule.module)
                self._listen(module, self._on_experts(rule.layer, wanted), before=True)

    def _listen(self, module: nn.Module, hook: Callable[..., None], before: bool = False) -> None:
        self._hooks.append((module, hook, before))

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [
            m.register_forward_pre_hook(h) if before else m.register_forward_hook(h) for m, h, before in self._hooks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def scores(self) -> Scores:
        values = {axis: dict(layers) for axis, layers in self._sums.items()}
        for layer, tokens in self._routed.items():
            if "experts" in values:
                values["experts"][layer] = values["experts"][layer] / tokens.clamp(min=1)
        return Scores(values)

    def _accumulate(self, axis: str, layer: int | None, value: torch.Tensor) -> None:
        layers = self._sums.setdefault(axis, {})
        key = -1 if layer is None else layer
        value = value.double().cpu()
        layers[key] = layers[key] + value if key in layers else value

    def _add(self, axis: str, layer: int | None, value: torch.Tensor) -> None:
        """Sum `(B, T, ...)` or `(B * T, ...)` over real positions."""
        real = self.mask if value.shape[:2] == self.mask.shape else self.mask.reshape(-1)
        self._accumulate(axis, layer, value[real].float().sum(0))

    def _on_input(self, axis: str, layer: int | None, size: int, groups: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            value = args[0].float()
            if (
                axis == "attention_heads"
            ):  # (..., kv * heads * head_dim) -> the norm of each head, (..., kv, heads per kv)
                value = value.unflatten(-1, (groups, size // groups, -1)).norm(dim=-1)
            self._add(axis, layer, value.abs())

        return hook

    def _on_mamba(self, layer: int | None, span: tuple[int, int], shape: tuple[int, int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            x = output[..., span[0] : span[1]].float()
            self._add(MAMBA, layer, x.unflatten(-1, shape).square())

        return hook

    def _on_experts(self, layer: int | None, wanted: set[str]) -> Callable[..., None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            x, index, weights = args  # (tokens, d), (tokens, k), (tokens, k)
            real = self.mask.reshape(-1)
            x, index, weights = (
                x.reshape(-1, x.shape[-1])[real],
                index.reshape(len(real), -1)[real],
                weights.reshape(len(real), -1)[real],
            )
            down = module.down_proj  # (E, d, i)
            reap, tokens = x.new_zeros(len(down), dtype=torch.float32), x.new_zeros(len(down), dtype=torch.float32)
            neurons = x.new_zeros(len(down), down.shape[-1], dtype=torch.float32)
            for expert in index.unique().tolist():
                token, slot = torch.where(index == expert)
                inner = _expert_neurons(module, expert, x[token])
                output = nn.functional.linear(inner, down[expert])
                reap[expert] = (weights[token, slot].float() * output.float().norm(dim=-1)).sum()
                tokens[expert] = len(token)
                neurons[expert] = inner.float().abs().sum(0)
            if "experts" in wanted:
                self._accumulate("experts", layer, reap)
                key = -1 if layer is None else layer
                self._routed[key] = self._routed.get(key, 0) + tokens.double().cpu()
            if "expert_ffn" in wanted:
                self._accumulate("expert_ffn", layer, neurons)

        return hook


def _expert_neurons(experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """Input of one expert's second matrix, `(tokens, expert_ffn)`, for gated and plain experts."""
    if hasattr(experts, "gate_up_proj"):
        gate, up = nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        return experts.act_fn(gate) * up
    return experts.act_fn(nn.functional.linear(x, experts.up_proj[expert]))


def _consumed_axis(rule: TensorRule, wanted: set[str]) -> str | None:
    """The axis that a linear layer leads back to `hidden` from, if it is scored at that layer's input."""
    if len(rule.dims) != 2 or [cut.axis for cut in rule.dims[0].cuts] != ["hidden"]:
        return None
    return next((cut.axis for cut in rule.dims[1].cuts if cut.axis in _CONSUMED and cut.axis in wanted), None)
