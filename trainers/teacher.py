"""The frozen model that all budgets learn from."""

from __future__ import annotations

import copy
import os
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from hf_elastic import ElasticForCausalLM
from hf_elastic.checkpoints.loading import load_stock
from hf_elastic.errors import ElasticConfigError

from .lora import base_of
from .resuming import differences


def load_teacher(
    teacher: Any, model: ElasticForCausalLM, options: Any, *, adapters: bool = False
) -> PreTrainedModel | None:
    """A frozen teacher in evaluation mode.

    Args:
        teacher (`PreTrainedModel` or `str`, *optional*): Model, or where to load it from; a copy of `model` if not given.
        options (`dict`, *optional*): For `from_pretrained`; the dtype defaults to the model's.
        adapters (`bool`, *optional*, defaults to `False`):
            Only adapters of the model are trained. Without them it is its own teacher: `None` instead of a copy.

    Raises:
        `ElasticConfigError`: options without anything to load, another vocabulary.
        `CheckpointError`: the teacher's files lack tensors, or hold others than its config says.
    """
    if isinstance(teacher, (str, os.PathLike)):
        teacher = load_stock(teacher, **{"dtype": model.dtype, **(options or {})})
    elif options:
        raise ElasticConfigError("teacher_model_init_kwargs need a teacher_model to load, a folder or Hub repository.")
    if teacher is None or base_of(teacher) is model:
        if adapters:
            return None
        teacher = copy.deepcopy(model)
    theirs, ours = teacher.get_output_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0]
    if theirs != ours:
        raise ElasticConfigError(
            f"the teacher's vocabulary has {theirs} tokens, the model's {ours}; their distributions cannot be compared. Use the parent, or "
            "resize one of them with resize_token_embeddings()."
        )
    return teacher.eval().requires_grad_(False)


def check_same_channels(teacher: PreTrainedModel, model: ElasticForCausalLM) -> None:
    """Raise for a teacher whose hidden states are not those of the parent, layer by layer and channel by channel.

    Raises:
        `ElasticConfigError`: other sizes (they are named), or the same with the channels in another order, as the parent had
            them before it was sorted.
    """
    theirs, ours = teacher.config.model_type, model.config.model_type
    different = differences({"model_type": theirs}, {"model_type": ours})
    if theirs == ours:
        different = differences(_sizes(teacher.config, model), _sizes(model.config, model))
    if different:
        named = ", ".join(different[:8]).replace(" there, ", " in the teacher, ").replace(" here)", " in the model)")
        raise ElasticConfigError(
            f"hidden_loss_weight compares hidden states channel by channel, so the teacher needs the parent's sizes; it differs in {named}. "
            "Leave teacher_model out, or set hidden_loss_weight=0."
        )
    # Rows enough to tell; training moves embeddings little, another order leaves nothing in common.
    channels = [m.get_input_embeddings().weight[:4096].detach().to(model.device).float() for m in (teacher, model)]
    alike = float(F.cosine_similarity(channels[0], channels[1], dim=0).median())
    if alike < 0.5:
        raise ElasticConfigError(
            f"hidden_loss_weight compares hidden states channel by channel, but the teacher's channels are not the model's (their embeddings "
            f"have a cosine of {alike:.2f}): elastify() sorts them. Give the sorted parent, leave teacher_model out, or set "
            "hidden_loss_weight=0."
        )


def _sizes(config: PreTrainedConfig, model: ElasticForCausalLM) -> dict[str, Any]:
    """Depth, and the size of every axis in every layer, which also says what kind of layer it is."""
    full = model.architecture.full(config)
    sizes = {axis: list(value) if isinstance(value, tuple) else value for axis, value in full.items}
    return {"num_hidden_layers": full.depth, **sizes}


def prepare_teacher(teacher: PreTrainedModel | None, accelerator: Accelerator, fsdp: bool) -> nn.Module | None:
    """Put the teacher where the student is, sharded if the student is; nothing to do for a student that is its own.

    Raises:
        `ElasticConfigError`: FSDP 1, or weights that only the first rank has.
    """
    if not fsdp:
        return None if teacher is None else accelerator.prepare_model(teacher, evaluation_mode=True)
    plugin = accelerator.state.fsdp_plugin
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ElasticConfigError(
            "FSDP 1 flattens parameters, so budgets cannot take parts of them; set fsdp_version to 2."
        )
    if teacher is None:
        return None
    if getattr(plugin, "cpu_ram_efficient_loading", False):
        # transformers then loads on the first rank only, and accelerate sends the student's weights to the others, but not the teacher's.
        raise ElasticConfigError(
            "cpu_ram_efficient_loading leaves the teacher without weights on all ranks but the first; set it to false."
        )
    policy = {"mp_policy": plugin.mixed_precision_policy} if plugin.mixed_precision_policy is not None else {}
    return shard_teacher(teacher.to(accelerator.device), **policy)


def shard_teacher(teacher: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Shard a frozen model over all ranks, a layer at a time, with `torch.distributed.fsdp.fully_shard`.

    What is outside the layers (embeddings, head) stays gathered after the first forward: chunks of logits are made long after it, and
    again in backward.

    Args:
        options: Passed to `fully_shard` (`mesh`, `mp_policy`, ...).
    """
    from torch.distributed.fsdp import fully_shard

    kinds = set(getattr(teacher, "_no_split_modules", None) or ())
    for module in [module for module in teacher.modules() if type(module).__name__ in kinds]:
        fully_shard(module, **options)
    return fully_shard(teacher, reshard_after_forward=False, **options)
