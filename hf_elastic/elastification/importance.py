"""Importance of every entry of every axis, from forward passes over calibration text (arXiv 2511.16664, eq. 1-5).

| what | score | eq. |
|---|---|---|
| the residual stream (`hidden`) | sum over norms, batch and positions of `abs(LN(X))` | A 1 |
| `ffn`, `shared_expert_ffn`, short-convolution and Mamba-1 channels | sum over batch and positions of the magnitude of the input of the matrix that leads back to the stream | A 2, after the activation |
| `expert_ffn` | the same in every expert | A 2 |
| `mamba_head_dim` | `norm2(s[:, d])` over all heads, `s = LN(X) W_x^T` | A 3 |
| `mamba_heads` | `norm2(s[h, top channels])`, ranked inside each group | A 4 |
| `value_head_dim`, `value_heads` of a DeltaNet | the same at the output projection, as the norm in front of it makes heads alike | A 3, A 4 |
| other heads | sum of the head's L2 norm at the output projection, ranked inside each KV group | |
| `experts` | REAP: mean over the tokens routed to j of `g_j(x) * norm2(f_j(x))` | arXiv 2510.13999 |
| `layers` | normalised squared error of the logits without the layer, removing the least important one after another | A 5 |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from ..architectures.submodel import LAYERS
from ..checkpoints.devices import copied_to, scoring_device
from ..checkpoints.loading import checked_parent
from ..checkpoints.replacing import replacing_file
from ..errors import CheckpointError, ElasticConfigError, shown
from .calibration import batches_of
from .listening import Listener, score_key


@dataclass
class Scores:
    """Importance scores of a parent; higher is kept longer.

    Args:
        values (`dict[str, dict[int, torch.Tensor]]`):
            Per axis, or order of its own, and layer (-1 for global axes) float64 scores: `(size,)`, or `(groups, size per group)` for attention heads,
            `(experts, expert_ffn)` for the neurons of experts. Heads and their channels have one entry, named by their part: under
            `mamba_channels` the second moments `(heads, head_dim)` of Mamba.
        layers (`list[tuple[int, float]]`): Layers in the order in which they are removed (least important first), with eq. A 5.
        info (`dict`): `model_type`, `samples` and `tokens` that were seen.
    """

    values: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    layers: list[tuple[int, float]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    def has(self, axis: str, architecture: Architecture | None = None) -> bool:
        """Whether an axis was scored, of the model's architecture if that is not given. The number of experts per token needs no score: the
        router ranks them itself."""
        if axis == LAYERS:
            return bool(self.layers)
        if architecture is None and "model_type" not in self.info:
            return axis in self.values
        known = architecture or get_architecture(self.info["model_type"])
        return axis in known.per_token.values() or score_key(known, axis) in self.values

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
    device: str | torch.device | None = "auto",
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
        device (`str` or `torch.device`, *optional*, defaults to `"auto"`):
            Where to compute. `"auto"` is the accelerator (`cuda`, `mps`, `xpu`, ...) if there is one and the weights fit into what is free on it, else
            where the model is. A copy is scored where that is another device; it is gone afterwards. Scores are the same up to rounding.

    Returns:
        [`Scores`]: In main memory, wherever they were computed.

    Raises:
        `ElasticConfigError`: unknown axis, no rows, rows without a column that can be read, or a device that cannot be used or is too small.
        `TokenizerError`: a row that the tokenizer has no tokens for.
    """
    model = checked_parent(model)
    place = scoring_device(model, device)
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
            f"calibration has token {smallest}; tokens are 0 or more; padding is marked by a 0 in attention_mask."
        )
    if largest >= vocabulary:
        raise ElasticConfigError(
            f"calibration has token {largest}, the parent's vocabulary has {vocabulary}; tokenize with the parent's own tokenizer."
        )
    try:
        scores = _scored(
            model if place == model.device else copied_to(model, place),
            architecture,
            batches,
            wanted,
            progress,
            depth_samples,
        )
    except torch.OutOfMemoryError as error:
        raise ElasticConfigError(
            f"{place} has too little memory for the parent and batches of {batch_size} rows of up to "
            f"{max(batch['input_ids'].shape[1] for batch in batches)} tokens; give a smaller batch_size or max_length, or device='cpu'."
        ) from error
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    scores.info = {"model_type": architecture.model_type, "samples": rows, "tokens": tokens}
    return scores


def _scored(
    model: PreTrainedModel,
    architecture: Architecture,
    batches: list[dict[str, torch.Tensor]],
    wanted: Sequence[str],
    progress: bool,
    depth_samples: int,
) -> Scores:
    listener = Listener(architecture, model, set(wanted))
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), listener.attached():
            for batch in tqdm(batches, desc="Scoring", disable=not progress):
                listener.mask = batch["attention_mask"].bool().to(model.device)
                inputs = {key: tensor.to(model.device) for key, tensor in batch.items()}
                # Nobody listens to the logits; all of them would be the largest tensor.
                model(**inputs, use_cache=False, logits_to_keep=1)
        scores = Scores(listener.values())
        _refuse_infinite(scores)
        if LAYERS in wanted:
            few = batches[: max(1, -(-depth_samples // len(batches[0]["input_ids"])))]
            scores.layers = rank_layers(model, few, progress=progress)
    finally:
        model.train(training)
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
        with _without(get_architecture(model.config.model_type), layers, gone):
            cut = model(**inputs, use_cache=False).logits[real].float()
        error += _total((full - cut).square())
        norm += _total(full.square())
    return error / norm


def _total(values: torch.Tensor) -> float:
    """The sum of `(tokens, vocabulary)` in float64, which Apple's GPUs do not have: there every token is summed in float32."""
    if values.device.type == "mps":
        return float(values.sum(-1).cpu().double().sum())
    return float(values.sum(dtype=torch.float64))


@contextmanager
def _without(architecture: Architecture, layers: nn.ModuleList, gone: Sequence[int]) -> Iterator[None]:
    """Let the layers pass their input on."""
    try:
        for layer in gone:
            layers[layer].forward = lambda hidden_states, *args, **kwargs: architecture.passed(hidden_states)
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
