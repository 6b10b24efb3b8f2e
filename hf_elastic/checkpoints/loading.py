"""What `from_pretrained` does with its arguments before and after the stock loader: which are refused, which go into the stock config."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import GENERATION_CONFIG_NAME

from ..architectures import ARCHITECTURES, get_architecture
from ..configuration.budgets import DTYPES
from ..configuration.hosting import parted
from ..configuration.parent import parent_from_dict, plain_parent_error
from ..configuration_elastic import ElasticConfig, read_config, read_fields
from ..errors import CheckpointError, ElasticConfigError, HFElasticError, did_you_mean, meant_budget, reason, shown
from ..storage.files import (
    INDEX_NAME,
    PICKLED_INDEX,
    SINGLE_NAME,
    find_file,
    find_files,
    missing,
    refuse_damaged,
    shard_names,
    with_variant,
)
from ..storage.json_files import read_json
from ..submodels.adapters import attached
from ..submodels.buffers import set_buffers
from ..submodels.loaded_from import LoadedFrom
from .checkpoint import ROTARY, Checkpoint
from .described import described_config
from .passengers import parent_inside


def load_config(repo: Any, config: Any, described: Any, hub: dict[str, Any]) -> ElasticConfig:
    """The elastic config that was given, that of a plain checkpoint as `elastic_config=` describes it, or the checkpoint's own."""
    if described is not None:
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise ElasticConfigError("give either config= or elastic_config=, not both.")
        return described_config(repo, described, **hub)
    if isinstance(config, ElasticConfig):
        refuse_damaged(repo, "config.json", hub)  # an AutoClass has read it
        return config
    if isinstance(config, PreTrainedConfig):
        raise plain_parent_error(repo, config.model_type)
    return read_config(config if config is not None else repo, **hub)


def as_loaded(
    name: LoadedFrom, config: Any, budget: Any, described: Any, kwargs: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """`config=`, `budget=` and `elastic_config=` for loading a model again by its name, and in `kwargs` where it was; what is given goes first.

    Raises:
        `ElasticConfigError`: the size was never saved there.
    """
    name.refuse_unsaved()
    again = name.add_hub(kwargs)
    if isinstance(config, PreTrainedConfig) and (
        not isinstance(config, ElasticConfig) or again and "revision" in name.hub
    ):
        # The AutoClasses read it, at that revision or as a stock one, and left in it what the user said.
        kwargs.setdefault("attn_implementation", config._attn_implementation)
        kwargs.setdefault("experts_implementation", config._experts_implementation)
        config = None
    return config, name.submodel if budget is None else budget, name.described if described is None else described


def checked_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Refuse what cannot be honoured, and what nobody knows."""
    if kwargs.get("use_safetensors") is False:
        raise ElasticConfigError("use_safetensors=False: elastic checkpoints are read from safetensors only.")
    if kwargs.get("state_dict") is not None:
        raise ElasticConfigError("give either a checkpoint or state_dict=, not both.")
    if adapter := (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path"):
        raise ElasticConfigError(
            f"{adapter} holds an adapter, which is not loaded along. Load the family it was trained on, at its size, then attach it: "
            f"PeftModel.from_pretrained(family, {str(adapter)!r}); merge_and_unload() gives the family with what was learned."
        )
    if kwargs.get("ignore_mismatched_sizes"):
        raise ElasticConfigError("ignore_mismatched_sizes would leave weights at random values; it is refused.")
    return {key: value for key, value in kwargs.items() if key != "variant"}


def load_dtype(kwargs: dict[str, Any], elastic: ElasticConfig) -> torch.dtype | None:
    """What the user asked for, otherwise what the config says; `None` if neither does."""
    given = [kwargs.pop(key, None) for key in ("torch_dtype", "dtype")]
    dtype = next((value for value in given if value is not None), "auto")
    if isinstance(dtype, str) and dtype == "auto" and (dtype := elastic.dtype) is None:
        return None
    named = dtype
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype) or getattr(torch, dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ElasticConfigError(
            f"dtype={shown(named)} must be 'auto', a floating-point torch.dtype or its name, such as 'bfloat16'."
        )
    return dtype


_CONSUMED = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
"""Arguments that the AutoClasses write into the elastic config because it has such a field, with the value that says nothing."""


def configured(
    stock: PreTrainedConfig, elastic: ElasticConfig, kwargs: dict[str, Any], concrete: type[PreTrainedModel]
) -> PreTrainedConfig:
    """Move what the user said about the config from the arguments, where the AutoClasses leave it, to the stock config.

    Raises:
        `ElasticConfigError`: a field that would change which tensors there are, or their shapes.
    """
    stock._attn_implementation = kwargs.pop("attn_implementation", elastic._attn_implementation)
    stock._experts_implementation = kwargs.pop("experts_implementation", elastic._experts_implementation)
    architecture = elastic.architecture
    for axis in architecture.axes:
        if axis.field in kwargs:
            raise ElasticConfigError(
                f"{axis.field}={kwargs[axis.field]!r} is a size, and the weights have one; choose a smaller one with "
                f"budget={{{axis.name!r}: ...}}."
            )
    given = {key: value for key, value in _CONSUMED.items() if getattr(elastic, key) != value}
    fields = {key: getattr(elastic, key) for key in given}
    known = set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
    for key in [key for key in kwargs if key not in known and not key.startswith("_") and hasattr(stock, key)]:
        fields[key] = kwargs.pop(key)
    before = architecture.rules(stock)
    for key, value in fields.items():
        setattr(stock, key, value)
        if architecture.rules(stock) != before:
            raise ElasticConfigError(
                f"{key}={shown(value)} does not fit the weights: they were saved with another {key}."
            )
    return stock


@contextmanager
def built_from(stock: PreTrainedConfig) -> Iterator[None]:
    """Errors of a stock class that cannot be built from its config (an unknown activation, a table that misses a name) as one of this package."""
    try:
        yield
    except (HFElasticError, torch.OutOfMemoryError):
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ElasticConfigError(
            f"no {stock.model_type} can be built from this config, it was edited or damaged, or an argument does not fit it: {reason(error)}."
        ) from error


def unknown_argument(name: str, stock: PreTrainedConfig, signature: Iterable[str]) -> TypeError:
    known = {
        *signature,
        "dtype",
        "device_map",
        *stock.to_dict(),
    }
    return TypeError(
        f"unexpected argument {name!r}: neither an argument of from_pretrained nor a field of {type(stock).__name__}."
        f"{meant_budget(name) or did_you_mean(name, known)}"
    )


_KINDS = {
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens"), "a whole number"),
    **dict.fromkeys(("num_beams", "num_return_sequences", "top_k", "no_repeat_ngram_size"), "a whole number"),
    **dict.fromkeys(
        ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "pad_token_id"), "a whole number"
    ),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), "a whole number or a list of them"),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), "a list of whole numbers"),
    **dict.fromkeys(
        ("temperature", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), "a number"
    ),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "guidance_scale", "max_time"), "a number"),
    **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"), "true or false"),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_logits", "output_scores"), "true or false"),
    **dict.fromkeys(("return_dict_in_generate", "token_healing"), "true or false"),
}
"""What fields of a generation config are. The stock class takes anything, and generation then fails, or not, somewhere else."""


def _is_kind(value: Any, kind: str) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind == "true or false":
        return isinstance(value, bool)
    if kind == "a number":
        return whole or (isinstance(value, float) and math.isfinite(value))
    several = isinstance(value, list) and all(_is_kind(entry, "a whole number") for entry in value)
    return {"a whole number": whole, "a list of whole numbers": several}.get(kind, whole or several)


def generation_config(concrete: type[PreTrainedModel], repo: Any, hub: dict[str, Any]) -> GenerationConfig | None:
    """The generation config of a checkpoint; `None` if none was saved, for which the stock class makes one from the config.

    Raises:
        `CheckpointError`: there is one, and it is damaged.
    """
    return _read_generation_config(repo, hub) if concrete.can_generate() else None


def _read_generation_config(repo: Any, hub: dict[str, Any]) -> GenerationConfig | None:
    path = find_file(repo, GENERATION_CONFIG_NAME, hub)
    if path is None:
        return None
    fields = read_json(path)
    for field, value in fields.items():
        if value is not None and (kind := _KINDS.get(field)) and not _is_kind(value, kind):
            raise CheckpointError(f"{path}: {field}={shown(value)} must be {kind}.")
    try:
        made = GenerationConfig.from_dict(fields)
        made.to_json_string()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no generation config: {reason(error)}.") from error
    made._original_object_hash = hash(
        made
    )  # as `from_pretrained` does: saving a model looks whether it was changed since
    return made


def refuse_incomplete(info: dict[str, Any], repo: Any) -> None:
    """Upstream goes on with random weights, or without some of the file's, where names do not match; never here."""
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors"):
        if names := sorted(name for name in map(str, info.get(key) or ()) if not re.search(ROTARY, name)):
            raise CheckpointError(
                f"loading {repo} left {key}: {names[:5]}{' ...' if len(names) > 5 else ''}. The files and config.json do not belong together, or "
                "are incomplete; nothing is computed with weights that are random or left out."
            )


_HUB = ("cache_dir", "revision", "token", "subfolder", "local_files_only", "force_download", "proxies")


def load_stock(repo: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """As `AutoModelForCausalLM.from_pretrained`, but strict: every tensor of the model is in the files, and every one of the files in the model.

    Of a larger model that a table knows, its parent, whether the AutoClass takes that one or not.

    Raises:
        `CheckpointError`: names the tensors that are missing, unknown or of another shape; for supported architectures before any is read.
        `ElasticConfigError`: its weights are quantised.
    """
    architecture, loader = None, AutoModelForCausalLM
    if not (kwargs.get("gguf_file") or kwargs.get("config")):
        hub = {key: kwargs[key] for key in _HUB if kwargs.get(key) is not None}
        fields = read_fields(repo, **hub)
        _read_generation_config(repo, hub)
        parent, around = parted(fields)
        architecture = ARCHITECTURES.get(parent["model_type"])
        if around is not None and fields["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            host = get_architecture(parent["model_type"]).host(fields["model_type"])
            loader = host.whole_class  # type: ignore[union-attr]
        if fields.get("quantization_config"):
            raise quantized_parent(repo)
        files = _weight_files(repo, kwargs.get("variant"), hub)
        if architecture is not None and files:
            Checkpoint(files).check(architecture, parent_from_dict(fields), ignored=architecture.ignored())
    if architecture is not None:
        old = {rf"\b{re.escape(before)}$": now for now, before in architecture.old_names.items()}
        kwargs = {"key_mapping": old, **kwargs} if old else kwargs
    try:
        model, info = loader.from_pretrained(repo, **{**kwargs, "output_loading_info": True})
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise CheckpointError(
            f"{repo} holds tensors of other shapes than its config.json says; transformers lists them above."
        ) from error
    refuse_incomplete(info, repo)
    if architecture is None:
        return model  # type: ignore[no-any-return]
    inside = parent_inside(model)
    loaded: PreTrainedModel = model if inside is None else inside[0]
    set_buffers(loaded)
    return loaded


def _weight_files(repo: Any, variant: str | None, hub: dict[str, Any]) -> list[Path]:
    """The safetensors files that the stock loader takes; none where it takes those of another format, whose names are compared when they are loaded.

    Raises:
        `CheckpointError`: a list of files is damaged, or one that it names is missing.
    """
    for name in (SINGLE_NAME, INDEX_NAME):
        if find_file(repo, with_variant(name, variant), hub) is not None:
            return find_files(repo, variant, **hub)
    index = find_file(repo, with_variant(PICKLED_INDEX, variant), hub)
    for name in () if index is None else shard_names(index, ".bin"):
        if os.path.isdir(repo) and find_file(repo, name, hub) is None:
            raise missing(name, PICKLED_INDEX)
    return []


def quantized_parent(where: Any) -> ElasticConfigError:
    """What to say to a parent whose weights are codes, or were."""
    return ElasticConfigError(
        f"{where} is quantised, and sorting would move weights out of the blocks that share a scale. Make the checkpoint elastic that it was quantised "
        "from, in 16 or 32 bits, and quantise that: hf-elastic elastify, then hf-elastic quantize."
    )


def refuse_quantized(model: PreTrainedModel) -> None:
    """Raise [`ElasticConfigError`] for a live parent whose weights are codes, of whatever library, or were when they were loaded."""
    coded = getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None)
    if (
        coded
        or getattr(model, "_decoded_from", None)
        or getattr(model, "elastic_config", None)
        and model.elastic_config.encodings
    ):
        raise quantized_parent(model.name_or_path or "the parent")


def checked_parent(parent: Any) -> PreTrainedModel:
    """A live stock model that can be scored and sorted, out of what `torch.compile` made of it.

    Raises:
        `ElasticConfigError`: adapters are attached, it is wrapped, or weights are not there.
    """
    model = getattr(parent, "_orig_mod", parent)  # torch.compile's, with the same modules
    if isinstance(model, nn.Module) and (attached(model) or hasattr(model, "peft_config")):
        raise ElasticConfigError(
            "adapters are attached to the parent, and they are no part of its weights: call merge_and_unload() first, and give what it returns."
        )
    if not isinstance(model, PreTrainedModel):
        raise ElasticConfigError(
            f"the parent must be a PreTrainedModel, or where to load one from, not {type(model).__name__}. Give the model that is wrapped in it."
        )
    away = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if away:
        raise ElasticConfigError(
            f"{len(away)} tensors of the parent, such as {away[0]}, have no storage: device_map put them on disk or away from their device. Load it "
            "whole, without device_map or with device_map='cpu'."
        )
    return model
