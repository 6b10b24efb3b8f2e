"""The budget router: learns which size every axis should have to meet a cost target (arXiv 2511.16664, eq. 6-12)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from ..architectures.cost import Cost, CostModel
from ..architectures.submodel import LAYERS
from ..configuration.budgets import FULL, Limit, unit_hint
from ..configuration_elastic import ElasticConfig
from ..errors import CheckpointError, ElasticConfigError, shown
from ..storage.checksums import verify_files
from ..storage.files import find_file
from ..storage.tensor_file import TensorFile
from ..submodels.soft import Mixture, keep_weights
from .choosing import Key
from .decisions import DEAD_ZONE, Decided, decide
from .targets import Target, limits_of, pinned_targets

ROUTER_FILE = "router.safetensors"
"""Beside the weights of a checkpoint whose config has a `router`."""
_WIDEST = 1 << 20


@dataclass(frozen=True)
class Schedule:
    """Temperature and logit scale over the router's training, both linear in the progress (0 to 1).

    Args:
        temperature (`tuple[float, float]`, *optional*, defaults to `(1.0, 0.05)`): Of the Gumbel-Softmax.
        logit_scale (`tuple[float, float]`, *optional*, defaults to `(1.0, 10.0)`): Multiplies the logits.
        hard_share (`float`, *optional*, defaults to 0.004): Share of micro-batches with straight-through hard samples.
    """

    temperature: tuple[float, float] = (1.0, 0.05)
    logit_scale: tuple[float, float] = (1.0, 10.0)
    hard_share: float = 0.004

    def at(self, progress: float) -> tuple[float, float]:
        """`(temperature, logit_scale)`; progress outside 0..1 counts as the nearer end."""
        p = min(1.0, max(0.0, progress))
        return tuple(a + p * (b - a) for a, b in (self.temperature, self.logit_scale))  # type: ignore[return-value]


class BudgetRouter(nn.Module):
    r"""
    One small network per axis (per layer for axes in `per_layer`): one-hot budget -> Linear -> LeakyReLU -> Linear -> logits over the
    axis's choices.

    Args:
        config ([`ElasticConfig`]): Its axes and choices are what the router chooses among.
        targets (`dict[str, str | float | dict]`):
            Per budget what it may cost: a share of the parent's parameters (`0.5`, `"50%"`, `"50% active"`), or `"12B"`, `"2.1B active"`, `"24GB"`, or with
            caches `{"memory": "24GB", "context_length": 32768, "batch_size": 4, "dtype": "bfloat16"}` (see [`hf_elastic.configuration.budgets`];
            memory without a `dtype` is that of the config). The whole parent (`"full"`) is always a budget of the router.
        per_layer (`list[str]`, *optional*): Axes with a choice of their own in every layer; `hidden` and `layers` are always global.
        width (`int`, *optional*, defaults to 256): Hidden width.
        std (`float`, *optional*, defaults to 0.05): Standard deviation of the initial weights; there are no biases.
        device (`str` or `torch.device`, *optional*): Where its weights are; on `"meta"` it has none, until `load`.

    Raises:
        `ElasticConfigError`: no axis with more than one choice, or targets that are not below the parent's cost or out of reach.
    """

    def __init__(
        self,
        config: ElasticConfig,
        targets: Mapping[str, Target],
        *,
        per_layer: Sequence[str] = (),
        width: int = 256,
        std: float = 0.05,
        device: str | torch.device | None = None,
    ):
        super().__init__()
        self.config, self.per_layer, self.width = config, tuple(per_layer), width
        self.count = CostModel(config.parent_config)
        self.full = config.architecture.full(config.parent_config)
        self.final_logit_scale = Schedule().logit_scale[1]
        self.targets = pinned_targets(targets, self.count.full, _load_dtype(config))
        self.limits = limits_of(self.targets, self.count.full, _load_dtype(config))
        self.names = [FULL, *sorted(self.limits, key=lambda name: (-self._share(name), name))]
        # In the order of the table, as config.json sorts its keys and samples are drawn one after the other.
        axes = [*(axis.name for axis in config.architecture.axes), LAYERS]
        self.choices = {
            axis: tuple(config.axes[axis]["choices"])
            for axis in axes
            if axis not in config.architecture.per_token.values()
            and len(config.axes.get(axis, {}).get("choices", ())) > 1
        }
        if not self.choices:
            raise ElasticConfigError("no axis has more than one choice; give choices to elastify(axes=...).")
        for axis in per_layer:
            if axis in (config.architecture.stream, LAYERS) or axis not in self.choices:
                raise ElasticConfigError(
                    f"per_layer={axis!r} must be an elastic axis that belongs to layers, one of {sorted(self.choices)}."
                )
            if config.architecture.axis(axis).shared:
                raise ElasticConfigError(
                    f"per_layer={axis!r}: layers share the block that has it, so it has one size in all of them; leave it out."
                )
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= _WIDEST:
            raise ElasticConfigError(f"width={shown(width)} of the router must be a whole number in 1..{_WIDEST}.")
        self.keys: list[Key] = []
        for axis in self.choices:
            layers: Sequence[int | None] = [None]
            if axis in per_layer:
                layers = config.architecture.layers_with(config.parent_config, config.architecture.axis(axis))
            self.keys += [(axis, layer) for layer in layers]
        self.networks = nn.ModuleDict(
            {
                _name(key): nn.Sequential(
                    nn.Linear(len(self.names), width, bias=False, device=device),
                    nn.LeakyReLU(0.1),
                    nn.Linear(width, len(self.choices[key[0]]), bias=False, device=device),
                )
                for key in self.keys
            }
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)
        if self.full.is_homogeneous:
            self._check_reach()

    # -- what it chooses -----------------------------------------------------------------------------------------------

    def logits(self, budget: str | torch.Tensor) -> dict[Key, torch.Tensor]:
        """Logits over the choices of every axis.

        Args:
            budget (`str` or `torch.Tensor`): A budget of the router, or weights over `names` between them, `(..., budgets)`.
        """
        device = next(self.parameters()).device
        if isinstance(budget, str):
            if budget not in self.names:
                raise ElasticConfigError(f"unknown budget {budget!r}; the router has {', '.join(self.names)}.")
            budget = F.one_hot(torch.tensor(self.names.index(budget)), len(self.names)).float()
        return {
            key: network(budget.to(device)) for key, network in zip(self.keys, self.networks.values(), strict=True)
        }

    def sample(
        self,
        budget: str,
        temperature: float,
        logit_scale: float = 1.0,
        *,
        hard: bool = False,
        generator: torch.Generator | None = None,
    ) -> dict[Key, torch.Tensor]:
        """Gumbel-Softmax probabilities of every axis (eq. 8), one-hot with soft gradients if `hard`."""
        sampled = {}
        for key, logits in self.logits(budget).items():
            uniform = (
                torch.rand(logits.shape, generator=generator, device="cpu").clamp(1e-9, 1 - 1e-7).to(logits.device)
            )
            gumbel = -torch.log(-torch.log(uniform))
            soft = F.softmax((logits * logit_scale + gumbel) / temperature, dim=-1)
            if hard:
                soft = F.one_hot(soft.argmax(), len(soft)).to(soft) - soft.detach() + soft
            sampled[key] = soft
        return sampled

    def mixture(self, probabilities: Mapping[Key, torch.Tensor]) -> Mixture:
        """Probabilities as the undecided submodel that the model runs."""
        layers = None
        if LAYERS in self.choices:
            ranking = self.config.axes[LAYERS]["ranking"]
            layers = keep_weights(probabilities[LAYERS, None], self.choices[LAYERS], ranking)
        rest = {key: pi for key, pi in probabilities.items() if key[0] != LAYERS}
        return Mixture({axis: sizes for axis, sizes in self.choices.items() if axis != LAYERS}, rest, layers)

    # -- what it costs -------------------------------------------------------------------------------------------------

    def expected(self, mixture: Mixture, limit: Limit) -> torch.Tensor:
        """The exact counter at the expected sizes: total or active parameters, or bytes of weights and caches."""
        total: Any = 0.0
        for place, layer in self.count.places(self.full.layers).items():
            part = self.measure(self.count.count(place, mixture.expected(self.full, layer)), limit)
            if place is not None and mixture.layers is not None:
                # Which layers stay is nested, so of those that share a block one stays as often as the most important does.
                part = part * mixture.layers[[*place] if isinstance(place, tuple) else [place]].max()
            total = total + part
        return torch.as_tensor(total, dtype=torch.float32)

    def resource_loss(self, budget: str, probabilities: Mapping[Key, torch.Tensor]) -> torch.Tensor:
        r"""`abs(P(d) / target - 1)` at the expected sizes d, zero inside the dead zone; for the whole parent instead
        `10 * MSE(pi, one-hot largest)`, as nothing but the largest choice is right there (eq. 12).
        """
        if budget == FULL:
            errors = [
                (pi - F.one_hot(torch.tensor(0), len(pi)).to(pi)).square().mean() for pi in probabilities.values()
            ]
            return 10 * torch.stack(errors).mean()
        limit = self.limits[budget]
        miss = (self.expected(self.mixture(probabilities), limit) / limit.value - 1).abs()
        return torch.where(miss <= DEAD_ZONE, torch.zeros_like(miss), miss)

    # -- what it decides -----------------------------------------------------------------------------------------------

    def decide(self, within: float = DEAD_ZONE) -> Decided:
        """Turn the choices into submodels that meet their targets by the exact count, nested from large to small; see
        [`hf_elastic.routing.decisions`]."""
        return decide(self, within)

    def freeze(self) -> BudgetRouter:
        """Train no further."""
        return self.requires_grad_(False).eval()

    # -- on disk -------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What it is rebuilt from, besides the axes of its config and its weights; `router` in the `elastic` section."""
        return {"targets": dict(self.targets), "per_layer": list(self.per_layer), "width": self.width}

    def rebuilt(self, config: ElasticConfig) -> BudgetRouter:
        """The same router for a config with the same axes, such as that of a parent with another vocabulary."""
        router = _described(config, self.describe())
        router.load_state_dict({name: tensor.clone() for name, tensor in self.state_dict().items()}, assign=True)
        return router.freeze()

    def save(self, folder: Path) -> None:
        """Write the weights into a folder."""
        state = {name: tensor.detach().contiguous().cpu() for name, tensor in self.state_dict().items()}
        save_file(state, folder / ROUTER_FILE, {"format": "pt"})

    def load(self, file: Path) -> BudgetRouter:
        """Read weights that `save` wrote.

        Raises:
            `CheckpointError`: the file is missing, damaged, or of a router with other axes, choices or targets. Nothing was changed.
        """
        if not file.exists():
            raise CheckpointError(f"{file} is missing, though the config says that there is a router.")
        header = TensorFile.opened(file)  # compared before anything of its sizes, or of the config's, is in memory
        mine = self.state_dict()
        wrong = sorted(mine.keys() ^ header.shapes.keys())
        both = sorted(mine.keys() & header.shapes.keys())
        wrong += [name for name in both if mine[name].shape != header.shapes[name] or header.dtypes[name] != "F32"]
        state = {} if wrong else load_file(file)
        wrong += [name for name in state if not state[name].isfinite().all()]
        if wrong:
            raise CheckpointError(
                f"{file} does not fit the router of this config ({len(wrong)} tensors, the first is {wrong[0]}); it belongs to other axes, "
                "choices or targets, or is damaged."
            )
        self.load_state_dict(state, assign=next(self.parameters()).is_meta)
        return self

    # -- helpers -------------------------------------------------------------------------------------------------------

    def measure(self, cost: Cost, limit: Limit) -> Any:
        """The quantity of a cost that a limit is about."""
        return limit.measure(cost, _load_dtype(self.config))

    @torch.no_grad()
    def _check_reach(self) -> None:
        smallest = {key: F.one_hot(torch.tensor(len(self.choices[key[0]]) - 1)).float() for key in self.keys}
        for name, limit in self.limits.items():
            least = float(self.expected(self.mixture(smallest), limit))
            if least > (1 + DEAD_ZONE) * limit.value:
                raise ElasticConfigError(
                    f"router target {name!r}={self.targets[name]!r} is out of reach: the smallest choices of all axes need "
                    f"{limit.of(least)}. Give smaller choices, or more axes.{unit_hint(limit)}"
                )

    def _share(self, name: str) -> float:
        limit = self.limits[name]
        return limit.value / self.measure(self.count.full, limit)


def read_router(
    config: ElasticConfig, repo: str | os.PathLike[str], *, verify: bool = False, **hub: Any
) -> BudgetRouter | None:
    """The router of a folder or Hub repository, if its config says that there is one.

    Args:
        verify (`bool`, *optional*, defaults to `False`): Compare it with its checksum first.

    Raises:
        `CheckpointError`: the file is missing, damaged, or does not fit the config.
    """
    if "router" not in config.elastic:
        return None
    router = _described(config, config.elastic["router"])
    file = find_file(repo, ROUTER_FILE, hub, verify=verify) or Path(repo) / ROUTER_FILE
    if verify and os.path.isdir(repo) and file.exists():
        verify_files(Path(repo, hub.get("subfolder") or ""), [file])
    return router.load(file).freeze()


def _described(config: ElasticConfig, description: Mapping[str, Any]) -> BudgetRouter:
    """A router whose weights are to be loaded: it has no storage, and making it draws none of the numbers that the caller's seed stands for."""
    return BudgetRouter(config, **description, device="meta")


def _name(key: Key) -> str:
    axis, layer = key
    return axis if layer is None else f"{axis}:{layer}"


def _load_dtype(config: ElasticConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
