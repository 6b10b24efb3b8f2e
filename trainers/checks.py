"""What a run is refused for before anything is loaded or changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_elastic import ElasticForCausalLM
from hf_elastic.errors import ElasticConfigError, TokenizerError, shown
from hf_elastic.generation.texts import check_tokens, unknown_token
from hf_elastic.submodels.adapters import attached
from hf_elastic.submodels.packed import refuse_packed

from .elastic_distillation_config import ElasticDistillationConfig
from .lora import base_of, check_attached


def refuse_ignored(args: ElasticDistillationConfig, kwargs: Mapping[str, Any]) -> None:
    """Raise for what `SFTTrainer` takes and a distillation loss would ignore."""
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise ElasticConfigError(f"{name} needs full logits, which are never built here; use a callback instead.")
    for name, neutral in (("loss_type", "nll"), ("label_smoothing_factor", 0.0), ("router_aux_loss_coef", None)):
        value = getattr(args, name)
        if value != neutral and value != 0.0:
            raise ElasticConfigError(
                f"{name}={shown(value)} would be ignored: the loss is the divergence from the teacher. Leave it at {neutral!r}."
            )


def refuse_sharded_blocks(model: ElasticForCausalLM, fsdp: bool) -> None:
    """Raise for a family whose layers share tensors, if it is to be sharded: every layer is sharded by itself."""
    rules = model.architecture.rules(model.elastic_config.parent_config)
    shared = next((rule.shared_by for rule in rules if len(rule.shared_by) > 1), ())
    if fsdp and shared:
        raise ElasticConfigError(
            f"layers {list(shared)} share tensors, and FSDP shards every layer by itself, which would tear them apart. Train on one device or with DDP."
        )


def refuse_handover(model: ElasticForCausalLM, trained: bool) -> None:
    """Raise for a family whose hand-over cannot be trained, if it is to be."""
    if trained and not model.architecture.reads_on:
        raise ElasticConfigError(
            f"handover_probability needs a model that reads several tokens on top of a cache, and the stock {model.architecture.model_type} forgets "
            "its cache then; leave it at 0."
        )


def check_columns(dataset: Any, name: str, args: ElasticDistillationConfig, formatting_func: Any) -> None:
    """Raise for a dataset, or one of a dict of them, without rows or any of the sets of columns that `SFTTrainer` reads."""
    skipped = (args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
    if dataset is None or formatting_func is not None or skipped:
        return
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if hasattr(part, "__len__") and len(part) == 0:
            raise ElasticConfigError(f"{name} is empty.")
        columns = set(getattr(part, "column_names", None) or next(iter(part)))
        known = [{"input_ids"}, {args.dataset_text_field}, {"messages"}, {"conversations"}, {"prompt", "completion"}]
        if not any(needed <= columns for needed in known):
            raise ElasticConfigError(
                f"{name} has the columns {', '.join(sorted(columns))}; it needs input_ids, {args.dataset_text_field}, messages, or "
                "prompt and completion (or give formatting_func)."
            )


_FIRST_ROWS = 1024


def check_rows(dataset: Any, name: str, tokenizer: Any, vocabulary: int) -> None:
    """Raise if the first rows of a tokenized dataset have tokens that the model does not have, or text that the tokenizer could not read."""
    if not hasattr(dataset, "__len__") or "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        return  # streams are looked at batch by batch
    unknown = unknown_token(tokenizer)
    for i, ids in enumerate(dataset[:_FIRST_ROWS]["input_ids"]):
        ids = torch.as_tensor(ids)
        check_tokens(ids, vocabulary, f"row {i} of the {name} dataset")
        if unknown is not None and bool((ids == unknown).any()):
            raise TokenizerError(
                f"row {i} of the {name} dataset has text that the tokenizer has no tokens for and reads as {tokenizer.unk_token!r}. Take it "
                "out, or use the tokenizer that the model was trained with."
            )


class CheckedCollator:
    """A data collator whose batches have only tokens that the model has; looked at here, where it costs no wait for a GPU.

    Args:
        collator (`Callable`): The other one.
        vocabulary (`int`): The model's.
    """

    def __init__(self, collator: Any, vocabulary: int):
        self.collator, self.vocabulary = collator, vocabulary

    def __call__(self, rows: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.collator(rows, *args, **kwargs)
        check_tokens(batch.get("input_ids"), self.vocabulary, "a row of the dataset")
        return batch


def known_budgets(given: list[str], names: list[str]) -> list[str]:
    """The budgets to evaluate, if the model has them all; raises otherwise."""
    for name in given:
        if name not in names:
            raise ElasticConfigError(f"eval_budgets: unknown budget {name!r}; the model has {', '.join(names)}.")
    return given


def check_layers(layers: Any, depth: int) -> None:
    """Raise unless `hidden_loss_layers` are different layers of the parent."""
    if layers is None:
        return
    if not isinstance(layers, list) or not layers or len(set(layers)) < len(layers):
        raise ElasticConfigError(f"hidden_loss_layers={layers!r} must be a list of different layers.")
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < depth:
            raise ElasticConfigError(
                f"hidden_loss_layers={layers!r}: {layer!r} is no layer of the parent, which has {depth}, counted from 0."
            )


def check_model(model: Any) -> ElasticForCausalLM:
    """The elastic model, under adapters that can follow a budget if there are any; raises otherwise."""
    base = base_of(model)
    if not isinstance(base, ElasticForCausalLM):
        raise ElasticConfigError(
            f"model must be an ElasticForCausalLM, got {type(base).__name__}; make one with elastify()."
        )
    refuse_packed(base, "training")
    if base is not model:
        check_attached(model)
    elif attached(model):
        raise ElasticConfigError(
            "adapters are attached to the model; pass the PeftModel around it, or merge or unload them first."
        )
    return base


@contextmanager
def without_auxiliary_loss(model: PreTrainedModel, args: ElasticDistillationConfig) -> Iterator[None]:
    """Have upstream set up no balancing loss, and leave the coefficient that the model's config has for others."""
    field = "router_aux_loss_coef"
    before = {key: getattr(model.config, key) for key in (field, "output_router_logits") if hasattr(model.config, key)}
    if field in before:
        setattr(args, field, 0.0)
    try:
        yield
    finally:
        for key, value in before.items():
            setattr(model.config, key, value)
