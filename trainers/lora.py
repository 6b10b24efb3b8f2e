"""LoRA adapters in a run: what is refused before any is attached, and the model without them as its own teacher."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel

from hf_elastic import ElasticForCausalLM
from hf_elastic.adapters.targets import check_targets, resolve_auto
from hf_elastic.errors import ElasticConfigError
from hf_elastic.submodels.adapters import attached, disabled, refuse_changed_weights, refuse_unsupported
from hf_elastic.submodels.slicing import build_meta
from hf_elastic.submodels.stencils import CutHead, uninstalled

from .losses import Head


def base_of(model: Any) -> Any:
    """The model under the adapters, or the model if there are none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_adapters(model: ElasticForCausalLM, peft_config: PeftConfig) -> PeftConfig:
    """The adapters that `peft_config` asks for, if they can follow a budget.

    They are attached to a copy without storage; the model stays as it is.

    Returns:
        `PeftConfig`: A copy. `target_modules="auto"` has become the names of everything that can be adapted; if it names no targets, it has
            peft's for `nemotron_h`, the projections of attention.

    Raises:
        `ElasticConfigError`: another kind of adapter, weights that would be trained beside it, a module that it may not adapt, or a name
            that matches nothing.
        `ValueError`: from peft, dropout on experts, for example.
    """
    if not isinstance(peft_config, LoraConfig):
        kind = type(peft_config).__name__
        raise ElasticConfigError(f"peft_config must be a peft.LoraConfig, got {kind}: other adapters cannot be cut.")
    if attached(model):
        raise ElasticConfigError(
            "adapters are attached to the model already, so peft_config would add a second one; merge or unload them, or pass the "
            "PeftModel without peft_config to train them further."
        )
    refuse_changed_weights(peft_config)
    config = copy.deepcopy(peft_config)
    if config.target_modules is None and not config.target_parameters:
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        config.target_modules = list(known.get(model.config.model_type, known["nemotron_h"]))
    resolve_auto(config, model.architecture, model.config)
    tree = build_meta(model.architecture, model.config, type(model))  # type: ignore[arg-type]
    check_targets(config, tree, model.architecture, model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says it again when it attaches them to the model
        inject_adapter_in_model(copy.deepcopy(config), tree, low_cpu_mem_usage=True)
    refuse_unsupported(tree, model.architecture, model.config)
    return config


def check_attached(model: PeftModel) -> None:
    """Refuse adapters of a given model that cannot follow a budget, as `check_adapters` does."""
    base: Any = model.get_base_model()
    for config in model.peft_config.values():
        if not isinstance(config, LoraConfig):
            raise ElasticConfigError(f"the model has {type(config).__name__} adapters; only those of LoRA can be cut.")
        refuse_changed_weights(config)
        check_targets(config, base, base.architecture, base.config)
    refuse_unsupported(base, base.architecture, base.config)


@contextmanager
def as_teacher(model: nn.Module) -> Iterator[None]:
    """Be the parent without adapters, in evaluation mode, inside a `with` block, whatever budget or mixture runs outside it."""
    training = [module for module in model.modules() if module.training]
    with disabled(model), uninstalled(model):
        for module in training:  # by hand: `train()` would switch the budget, too
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def whole_head_of(model: PreTrainedModel) -> Head:
    """From last hidden states of the parent to logits, whatever budget runs."""
    scaling, head = getattr(model.config, "logits_scaling", 1.0), model.get_output_embeddings()
    head = head.module if isinstance(head, CutHead) else head
    return lambda hidden: type(head).forward(head, hidden) / scaling
