"""What has to be the same when a run goes on from a checkpoint, and which checkpoints are whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from hf_elastic import ElasticConfig
from hf_elastic.adapters.slices import FAMILY_FILE
from hf_elastic.errors import CheckpointError, ElasticConfigError
from hf_elastic.storage.json_files import read_json

from .curriculum import Curriculum, first_step
from .elastic_distillation_config import ElasticDistillationConfig

logger = logging.get_logger(__name__)

STATE_FILE = "elastic_training.json"
"""Beside `trainer_state.json`: what the budget stream and the loss depend on."""

_INCIDENTAL = (
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "output_router_logits",
    "pad_token_id",
    "router_aux_loss_coef",
    "transformers_version",
    "use_cache",
)
"""Fields of a parent's config that trainers and tokenizers set, and that change no weight."""


_ARGUMENTS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "assistant_only_loss",
    "completion_only_loss",
    "data_seed",
    "learning_rate",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_length",
    "optim",
    "warmup_steps",
    "weight_decay",
)
"""What else decides what a step does. Upstream takes the rates and the optimizer's constants from the checkpoint, and says nothing."""

_ROUTER_ARGUMENTS = ("router_hard_share", "router_learning_rate", "router_loss_weight", "router_steps")

_INCIDENTAL_TO_ADAPTERS = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
)
"""Fields of an adapter's config that say where it is used, not what it is."""


_ROWS = "per_device_train_batch_size * gradient_accumulation_steps * processes"


def training_state(
    curriculum: Curriculum, args: ElasticDistillationConfig, num_tokens: int | None = None
) -> dict[str, Any]:
    """What a resumed run has to agree with.

    Args:
        num_tokens (`int`, *optional*): Tokens trained on so far; only reported, not compared.
    """
    stages = [
        {**asdict(stage), "budget_probabilities": dict(stage.budget_probabilities)} for stage in curriculum.stages
    ]
    for stage in stages:
        if stage["handover_probability"] == 0:  # a run without it is one from before it existed
            del stage["handover_probability"]
    state = {"seed": curriculum.seed, "beta": args.beta, "temperature": args.temperature, "stages": stages}
    if args.hidden_loss_weight > 0:  # a run without it is one from before it existed
        layers = args.hidden_loss_layers
        state |= {
            "hidden_loss_weight": args.hidden_loss_weight,
            "hidden_loss": args.hidden_loss,
            "hidden_loss_layers": None if layers is None else sorted(layers),
        }
    if args.quantization is not None:
        start = args.quantization_start
        start = first_step(start, args.max_steps) if args.max_steps > 0 else start
        state |= {"quantization": args.quantization, "quantization_start": start}
    if args.freeze_model:
        state["freeze_model"] = True
    if args.stop_on_plateau:
        state["stop_on_plateau"] = True
    if args.handover_token is not None:
        state["handover_token"] = args.handover_token
    given = args.to_dict()
    state["arguments"] = {name: given[name] for name in _ARGUMENTS} | {_ROWS: args.rows_per_step}
    if args.router_targets and not args.freeze_router:
        state["router_arguments"] = {name: given[name] for name in _ROUTER_ARGUMENTS}
    return state if num_tokens is None else {**state, "num_tokens": num_tokens}


def check_training(folder: str, ours: Mapping[str, Any]) -> int:
    """Compare a checkpoint's seed, loss, optimizer and past stages with the run that wants to go on from it.

    Stages that had not begun when it was saved may differ, and the current one may get longer. Another number of processes may go on with
    as many rows a step. A router that is frozen from now on no longer needs what it was trained with.

    Returns:
        `int`: Tokens that the checkpoint was trained on; 0 if it does not say.

    Raises:
        `ElasticConfigError`: names the fields that differ.
        `CheckpointError`: there is no complete checkpoint in the folder.
    """
    state = _state_of(Path(folder))
    if state is None:
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no readable trainer_state.json.")
    if not (Path(folder) / STATE_FILE).exists():  # of a trainer without a curriculum
        return 0
    theirs = read_json(Path(folder) / STATE_FILE)
    tokens = theirs.pop("num_tokens", 0)
    for progress in ("progress", "plateau"):
        theirs.pop(progress, None)
    stages = theirs.get("stages")
    if not isinstance(stages, list) or not all(
        isinstance(s, dict) and isinstance(s.get("steps"), int) for s in stages
    ):
        raise CheckpointError(f"{Path(folder) / STATE_FILE} lists no stages; it is damaged or incomplete.")
    past = [{**run, "stages": _until(run["stages"], state.global_step)} for run in (theirs, ours)]
    for run in past:
        if isinstance(start := run.get("quantization_start"), (int, float)):  # one that is still to come may be moved
            run["quantization_start"] = min(start, state.global_step)
    for group in ("arguments", "router_arguments"):
        found = [run.pop(group, None) for run in past]
        if None not in found:  # it was saved before there were any, or the router is frozen
            past = [run | arguments for run, arguments in zip(past, found, strict=True)]
    if all(stage["learning_rate"] is not None for stage in ours["stages"]):
        past = [{**run, "learning_rate": None} for run in past]  # which has no effect
    _refuse(folder, "run", differences(past[0], past[1]))
    return tokens


def saved_progress(folder: str, part: str) -> dict[str, Any]:
    """How the run of a checkpoint had gone, `"progress"` or `"plateau"`; empty if it does not say."""
    file = Path(folder) / STATE_FILE
    return (read_json(file).get(part) or {}) if file.exists() else {}


def check_family(folder: str, ours: ElasticConfig) -> bool:
    """Compare the parent and the budgets of a checkpoint with a model's.

    Returns:
        `bool`: Whether hand-over was trained in the checkpoint; the model that goes on from it may not say so yet.

    Raises:
        `ElasticConfigError`: names the fields that differ.
    """
    if (Path(folder) / FAMILY_FILE).exists():
        saved = ElasticConfig.from_json_file(Path(folder) / FAMILY_FILE)
    elif (Path(folder) / "config.json").exists():
        saved = ElasticConfig.from_pretrained(folder)
    else:  # sharded checkpoints of FSDP hold only weights
        return ours.handover_trained
    _refuse(folder, "family", differences(_description(saved), _description(ours)))
    return saved.handover_trained


def check_adapter(folder: str, ours: PeftConfig | None) -> None:
    """Compare the adapter of a checkpoint with a run's; upstream loads what fits and leaves the rest at its start.

    Raises:
        `ElasticConfigError`: names the fields that differ.
        `CheckpointError`: the checkpoint holds all weights instead of an adapter, or the other way round.
    """
    there = (Path(folder) / "adapter_config.json").exists()
    if ours is None:
        if there:
            raise CheckpointError(
                f"{folder} holds an adapter, it is of a run with adapters; give peft_config (use_peft: true), or start without it."
            )
        return
    if not there:
        raise CheckpointError(
            f"{folder} holds no adapter, it is of a run that trained all weights; leave out peft_config."
        )
    saved, here = (
        {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL_TO_ADAPTERS}
        for config in (PeftConfig.from_pretrained(folder), ours)
    )
    _refuse(folder, "adapter", differences(saved, here))


def last_complete(output_dir: str | None) -> str:
    """The checkpoint with the most steps that was saved to the end.

    Raises:
        `CheckpointError`: there is none.
    """
    folders = {}
    for folder in Path(output_dir or ".").glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", folder.name) and folder.is_dir():
            folders[int(folder.name.partition("-")[2])] = folder
    for step in sorted(folders, reverse=True):
        if is_complete(folders[step]):
            return str(folders[step])
        logger.warning("%s was not saved to the end; looking for an older checkpoint.", folders[step])
    raise CheckpointError(f"there is no complete checkpoint in {output_dir} to resume from.")


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that was saved to the end: its trainer_state.json is written last."""
    return _state_of(folder) is not None


def _state_of(folder: Path) -> TrainerState | None:
    try:
        return TrainerState.load_from_json(str(folder / "trainer_state.json"))
    except (OSError, ValueError, TypeError):  # not there, or cut off
        return None


def _until(stages: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The part of the stages before an optimizer step; the last one goes on."""
    past: list[dict[str, Any]] = []
    for i, stage in enumerate(stages):
        if step <= 0:
            break
        steps = step if i == len(stages) - 1 else min(step, stage["steps"])
        past.append({**stage, "steps": steps})
        step -= steps
    return past


def _description(config: ElasticConfig) -> dict[str, Any]:
    parent = config.to_dict()["parent_config"]
    return {
        "parent_config": {key: value for key, value in parent.items() if key not in _INCIDENTAL},
        **{
            key: value
            for key, value in json.loads(json.dumps(config.elastic)).items()
            if key not in ("handover", "version")
        },
    }


def differences(theirs: Any, ours: Any, where: str = "") -> list[str]:
    """Every place where two nested values differ, with both values."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        keys = {**theirs, **ours}
        return [
            text
            for key in keys
            for text in differences(theirs.get(key), ours.get(key), f"{where}.{key}" if where else str(key))
        ]
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        return [
            text
            for i, (a, b) in enumerate(zip(theirs, ours, strict=True))
            for text in differences(a, b, f"{where}[{i}]")
        ]
    return [] if theirs == ours else [f"{where} ({theirs!r} there, {ours!r} here)"]


def _refuse(folder: str, what: str, different: list[str]) -> None:
    if different:
        more = f" and {len(different) - 8} more" if len(different) > 8 else ""
        raise ElasticConfigError(
            f"{folder} is of another {what}: {', '.join(different[:8])}{more}. Resume with what it was started with."
        )
