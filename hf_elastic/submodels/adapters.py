"""LoRA adapters at a budget: what runs along A and B, and which adapters can follow a budget.

The adapter of a tensor W is two more elastic tensors. What runs along them follows from what runs along W, by the layouts of peft:

```
W  [out, in]             A  [r, in]              B  [out, r]
W  [experts, out, in]    A  [experts * r, in]    B  [out, r * experts]      A lies expert by expert, B rank by rank
```

So `slice(W + s B A) = slice(W) + s slice(B) slice(A)`: the adapter of a slice is the slice of the adapter. A stencil carries peft's own
adapter layers, without storage, and takes both from the parent; dropout, scaling and dtypes stay peft's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedConfig

from ..architectures import Architecture
from ..architectures.axes import Cut, TensorRule, dim
from ..configuration.section import CUT_FROM
from ..errors import ElasticConfigError
from .packed import refuse_packed

if TYPE_CHECKING:
    from peft import LoraConfig


_SLICED = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.layer.ParamWrapper")
"""Adapter layers whose factors are cut here. By name, because peft is optional."""


@dataclass(frozen=True)
class FactorRule(TensorRule):
    """What runs along A or B of an adapter."""


def factor_rules(rule: TensorRule, rank: int) -> tuple[FactorRule, FactorRule]:
    """Rules of the two factors, as peft stores them.

    Args:
        rule (`TensorRule`): Of the tensor that is adapted, `[out, in]` or `[experts, out, in]`.

    Returns:
        `tuple[FactorRule, FactorRule]`: Of A and of B. While sizes are undecided, experts are weighted in B only.
    """
    *experts, out, inner = rule.dims
    a, b = dim(rank), dim(rank)
    if experts:
        ((_, segment),) = experts[0].segments
        plain = tuple(Cut(f.axis, f.groups) if isinstance(f, Cut) else f for f in segment)
        a, b = dim(*plain, rank), dim(rank, *segment)
    prefix = f"{rule.template}.lora"
    return FactorRule(f"{prefix}_A", (a, inner), rule.layer), FactorRule(f"{prefix}_B", (out, b), rule.layer)


MARK = "elastic"
"""Under `auto_mapping` of a saved adapter's config, which peft keeps and does not use where the task is known: the size it was trained at."""


class AdaptableMixin:
    """Adapters of peft know the size that they are made for: peft hands their configs to the model that it attaches them to."""

    @property
    def peft_config(self) -> dict[str, Any]:
        """Configs of the attached adapters, as peft keeps them."""
        try:
            return self.__dict__["peft_config"]
        except KeyError:
            raise AttributeError("no adapters are attached") from None

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        try:
            for config in configs.values():
                _check_size(self, config)
        except ElasticConfigError:
            detach(self)  # type: ignore[arg-type]
            raise
        self.__dict__["peft_config"] = configs  # peft's own dict, into which it puts further adapters without a word

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("peft_config", None)

    def _check_further(self) -> None:
        for name, config in list(self.__dict__.get("peft_config", {}).items()):
            try:
                _check_size(self, config)
            except ElasticConfigError:
                for layer in [layer for layer in self.modules() if is_tuner(layer)]:  # type: ignore[attr-defined]
                    layer.delete_adapter(name)
                del self.peft_config[name]
                raise

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_further()
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_further()
        super()._save_to_state_dict(*args, **kwargs)  # type: ignore[misc]


def _check_size(model: Any, config: Any) -> None:
    """Refuse the adapter of a slice on anything of another size, and write into a new one which slice it is of."""
    refuse_packed(model, "an adapter, which is merged into weights,")
    elastic = model.elastic_config
    here = model.architecture.full(model.config)
    sizes = {**here.to_dict(), "num_hidden_layers": here.depth}
    mark = (config.auto_mapping or {}).get(MARK)
    if isinstance(mark, Mapping):
        if mark.get("sizes") != sizes:
            raise ElasticConfigError(
                f"the adapter was trained at budget={mark.get('budget')!r} of a family, and this model is of another size. Load that size: "
                f"AutoPeftModelForCausalLM.from_pretrained(adapter, budget={mark.get('budget')!r}), or from_pretrained(family, "
                f"budget={mark.get('budget')!r}) and PeftModel.from_pretrained(it, adapter)."
            )
        return
    origin = getattr(elastic, CUT_FROM, None)
    if here != model._full:
        origin = {"budget": model.budget, "sizes": model.submodel.to_dict()}
    if origin is not None:
        budget = origin.get("budget") or origin.get("sizes")
        config.auto_mapping = {**(config.auto_mapping or {}), MARK: {"budget": budget, "sizes": sizes}}
        if config.task_type is None:  # peft then writes over it
            config.task_type = "CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION"


def detach(model: nn.Module) -> None:
    """Put back the modules that adapter layers were put around."""
    layer: Any
    for holder in [module for module in model.modules() if not is_tuner(module)]:
        for leaf, layer in [(leaf, layer) for leaf, layer in holder.named_children() if is_tuner(layer)]:
            while is_tuner(layer):
                layer = getattr(layer, "original_module", None) or layer.base_layer
            setattr(holder, leaf, layer)


def is_tuner(module: Any) -> bool:
    """Whether a module is a layer of peft that wraps a module of the model."""
    return hasattr(type(module), "adapter_layer_names")


def attached(model: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """What is attached to a model, as something to compare: adapter layers and the names of their adapters."""
    return tuple((id(m), *getattr(m, "lora_A", ())) for m in model.modules() if is_tuner(m))


_STARTS = (True, False, "gaussian", "orthogonal")
"""Initialisations that leave the weights under the adapter as they are."""


def refuse_changed_weights(config: LoraConfig) -> None:
    """Refuse adapters that are not the whole change, or whose start changed the weights under them."""
    if config.bias != "none":
        raise ElasticConfigError(
            f"bias={config.bias!r} trains biases beside the adapter, which then is not the whole change; leave it at 'none'."
        )
    if config.layer_replication:
        raise ElasticConfigError(
            f"layer_replication={config.layer_replication!r} makes a parent of another depth; leave it out."
        )
    if config.init_lora_weights not in _STARTS:
        allowed = ", ".join(map(repr, _STARTS))
        raise ElasticConfigError(
            f"init_lora_weights={config.init_lora_weights!r} changes the weights under the adapter or needs data; use {allowed}."
        )


def rules_by_name(architecture: Architecture, config: PreTrainedConfig) -> dict[str, TensorRule]:
    """The rules of a parent by the names of a causal model and by those of a base model."""
    rules = {rule.name: rule for rule in architecture.rules(config)}
    prefix = architecture.layers_path.partition(".")[0] + "."
    return {name.removeprefix(prefix): rule for name, rule in rules.items()} | rules


def problem_of(rule: TensorRule | None) -> str | None:
    """What is wrong with an adapter of a tensor whatever is done with it; `None` stands for one that no table knows."""
    if rule is None:
        return "the table of this architecture has no such tensor, so nothing says what a size keeps of it"
    if rule.passed_by_kernels:
        return "the stock code hands this weight to kernels and does not call its module, so the adapter would be passed by"
    if len(rule.shared_by) > 1:  # peft gives each layer an adapter of its own
        return (
            f"layers {list(rule.shared_by)} share this tensor, and merging the adapter of one would change it for all"
        )
    if rule.user is not None:
        return "which entry of its list it is depends on the layers that are kept, and an adapter has one name at all sizes"
    if len(rule.dims) != (3 if rule.routed else 2):
        return "only matrices can be adapted"
    return None


def adaptable(rule: TensorRule) -> bool:
    """Whether adapters belong on this tensor of a parent: on every linear layer of its layers, and on experts, but for routers and what kernels take."""
    weight = rule.routed or rule.name.endswith(".weight")
    return rule.layer is not None and weight and not rule.buffer and not rule.routes and problem_of(rule) is None


def refuse_unsupported(model: nn.Module, architecture: Architecture, config: PreTrainedConfig) -> None:
    """Refuse adapters whose slice is not the adapter of the slice, or that a kernel would pass by.

    Raises:
        `ElasticConfigError`: names the module, and what can be adapted.
    """
    rules = rules_by_name(architecture, config)
    for path, layer in model.named_modules():
        if not is_tuner(layer):
            continue
        name = path.replace(".base_layer", "")
        rule = rules.get(f"{name}.{getattr(layer, 'parameter_name', 'weight')}")
        problem = None
        if f"{type(layer).__module__}.{type(layer).__name__}" not in _SLICED:
            problem = f"{type(layer).__module__}.{type(layer).__name__} cannot follow a budget"
        elif layer.lora_variant:
            problem = f"{', '.join(type(v).__name__ for v in layer.lora_variant.values())} cannot follow a budget"
        elif any(layer.lora_bias.values()):
            problem = "lora_bias=True cannot follow a budget"
        elif rule is not None and rule.layer is None:
            problem = "only tensors of layers can be adapted, no embeddings and no head"
        else:
            problem = problem_of(rule)
        if problem:
            raise ElasticConfigError(
                f"the adapter of {name or 'the model'} is not supported: {problem}. Use a peft.LoraConfig without variants, target_modules "
                "such as q_proj, in_proj and up_proj, and target_parameters such as experts.up_proj and experts.down_proj; target_modules='auto' "
                "of a trainer, or **hf_elastic.lora_targets(model), takes all that can be adapted."
            )


def follow(own: Any, carried: Any) -> None:
    """Take over which adapters are active, disabled or merged."""
    if own.disable_adapters and own.merged:
        own.unmerge()  # as peft's forward does; the narrowed weights could not be restored
    for name in ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling"):
        carried.__dict__[name] = own.__dict__.get(name, getattr(own, name))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Compute without adapters inside a `with` block.

    peft's `disable_adapter` freezes them, too, and FSDP2 remembers what required a gradient when it first gathered.
    """
    tuners: list[Any] = [module for module in model.modules() if is_tuner(module)]
    before = [tuner.disable_adapters for tuner in tuners]
    for tuner in tuners:
        tuner._disable_adapters = True
    try:
        yield
    finally:
        for tuner, was in zip(tuners, before, strict=True):
            tuner._disable_adapters = was


def wrappers(layer: Any) -> Iterator[Any]:
    """Adapter layers around one module, outermost first; each parameter of a module has its own."""
    while is_tuner(layer):
        yield layer
        layer = layer.base_layer


def factors(layer: Any) -> Iterator[nn.Parameter]:
    for wrapper in wrappers(layer):
        yield from wrapper.lora_A.parameters()
        yield from wrapper.lora_B.parameters()
