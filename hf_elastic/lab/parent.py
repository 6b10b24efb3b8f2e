"""The parent of the lab: a hybrid of Mamba, attention and mixture-of-experts layers that learned the `book` task.

It ships with the package, see [`load_parent`]. `python -m hf_elastic.lab.parent --output DIR` trains it again.
"""

import argparse
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hf_elastic.checkpoints.loading import load_stock
from hf_elastic.lab.book import build_tokenizer, evaluate, training_batches
from hf_elastic.lab.muon import Muon

logger = logging.getLogger(__name__)

PARENT_DIR = Path(str(resources.files("hf_elastic.lab"))) / "assets" / "parent"
"""Folder of the shipped parent: its checkpoint, its tokenizer and `training.json`, the record of its training."""

# Where the schedule of the learning rate bends, as fractions of the run, and its last value as a fraction of the peak.
_WARMUP_STEPS = 50
_DECAY_START = 0.6
_LAST_FACTOR = 0.02
_CLIP_NORM = 1.0

# Matrices by shape, but not weights that act as one: look-up tables, the router's few rows, a depthwise convolution.
_NOT_MUON = ("embeddings.weight", "lm_head.weight", "gate.weight", "conv1d.weight")

_EVALUATED_LETTERS = (4, 8, 12)
_EVALUATED_PROBLEMS = 200


def parent_config(**overrides: Any) -> NemotronHConfig:
    """Gives the configuration of the parent: 6 layers of width 48, 141,856 parameters.

    Args:
        **overrides (`Any`): Fields of `NemotronHConfig` to set otherwise, such as `hidden_size=64`.

    Returns:
        `NemotronHConfig`: A configuration with the vocabulary and the special tokens of
        [`~hf_elastic.lab.book.build_tokenizer`].

    Example:

    ```python
    >>> from hf_elastic.lab.parent import parent_config
    >>> parent_config().hybrid_override_pattern
    'ME*EME'
    ```
    """
    tokenizer = build_tokenizer()
    fields = {
        "hybrid_override_pattern": "ME*EME",
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "mamba_num_heads": 8,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "ssm_state_size": 16,
        # Sequences are short: the scan pads them to a multiple of this many tokens.
        "chunk_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 64,
        # Only a pattern with `-` uses it; the default is made for a model a hundred times as wide.
        "intermediate_size": 64,
        # With the usual 0.02 so narrow a model learns much more slowly.
        "initializer_range": 0.08,
        # The longest problem, 20 letters, has 218 tokens.
        "max_position_embeddings": 256,
    }
    return NemotronHConfig(**(fields | overrides))


def _optimizers(model: NemotronHForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices, those of the experts batched, and AdamW for everything else."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith(_NOT_MUON)
        (matrices if is_matrix else others).append(parameter)
    return [
        Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up, constant, then linear to the last value; `step` counts from 0, the result is in (0, 1]."""
    warmup = (step + 1) / _WARMUP_STEPS
    progress = (step + 1) / steps
    decay = 1 - (1 - _LAST_FACTOR) * max(0.0, progress - _DECAY_START) / (1 - _DECAY_START)
    return min(1.0, warmup, decay)


def _new_model(seed: int, overrides: Mapping[str, Any] = MappingProxyType({})) -> NemotronHForCausalLM:
    # Everything random about a training run besides its data is here, so the caller's generator is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NemotronHForCausalLM(parent_config(**overrides))
    model.generation_config.do_sample = False
    # A problem of 20 letters takes 156 new tokens; without a value generation would stop after 20.
    model.generation_config.max_new_tokens = 160
    return model


def train_parent(
    *,
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    progress: bool = True,
    log: Callable[[dict[str, float]], None] | None = None,
    **overrides: Any,
) -> tuple[NemotronHForCausalLM, list[dict[str, float]]]:
    """Trains a parent from scratch, in a few minutes on one CPU core.

    The thinking is learned first and the answer last. With seed 0, a whole run of 400, 700 or 1000 steps has every
    thinking of 12 letters right, but 0, 0.26 or 0.995 of the answers. Runs shorter than the default are for trials.

    Args:
        seed (`int`, *optional*, defaults to 0): Seed of the weights and of the data. The same seed gives the same
            weights on the same machine with the same number of threads.
        steps (`int`, *optional*, defaults to 1000): Optimizer steps.
        batch_size (`int`, *optional*, defaults to 32): Examples per step.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where to train.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        log (`Callable`, *optional*): Called after every step with its record.
        **overrides (`Any`): As for [`parent_config`], to train another size.

    Returns:
        `tuple[NemotronHForCausalLM, list[dict]]`: The model, in evaluation mode, and one record per step: `step`,
        counted from 1, and `loss`, the mean cross-entropy in nats per target token before the step.

    Raises:
        `ValueError`: If `steps` or `batch_size` is not positive.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps!r}.")
    model = _new_model(seed, overrides).to(device).train()
    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, steps))
        for optimizer in optimizers
    ]
    batches = training_batches(build_tokenizer(), seed, batch_size)
    history = []
    bar = tqdm(range(1, steps + 1), desc="train parent", unit="step", disable=not progress)
    for step in bar:
        batch = {name: tensor.to(device) for name, tensor in next(batches).items()}
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        history.append({"step": step, "loss": loss.item()})
        bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", refresh=False)
        if log is not None:
            log(history[-1])
    return model.eval(), history


def load_parent() -> tuple[NemotronHForCausalLM, PreTrainedTokenizerFast]:
    """Loads the parent that ships with the package. Needs no network.

    It solves problems of 4 to 12 letters. Longer ones can be made, but it never saw their letters and fails on them.

    Returns:
        `tuple[NemotronHForCausalLM, PreTrainedTokenizerFast]`: The model, in float32 and evaluation mode, and its
        tokenizer.

    Example:

    ```python
    >>> from hf_elastic.lab.parent import load_parent
    >>> model, tokenizer = load_parent()
    >>> inputs = tokenizer("^a6b-1c-5d-4><think>", return_tensors="pt")
    >>> tokenizer.decode(model.generate(**inputs)[0])
    '^a6b-1c-5d-4><think>a6b6-1=5c5-5=0d0-4=6</think>bLcLdJ<eos>'
    ```
    """
    model: Any = load_stock(PARENT_DIR, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(PARENT_DIR)


def save_trained(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    steps: int,
    seconds: float,
    **measured: Any,
) -> None:
    """Saves a trained model with its tokenizer and `training.json`, a record of how it came about and what was measured."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "seed": seed,
        "steps": steps,
        "seconds": round(seconds, 1),
        "num_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **measured,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Trains a parent, evaluates it and saves it with its tokenizer and a record of the training."""
    parser = argparse.ArgumentParser(prog="python -m hf_elastic.lab.parent", description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to save to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the data")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    options = parser.parse_args(arguments)

    started = time.perf_counter()
    model, history = train_parent(seed=options.seed, steps=options.steps)
    seconds = time.perf_counter() - started
    tokenizer = build_tokenizer()
    evaluation = []
    for letters in _EVALUATED_LETTERS:
        for thinking in (True, False):
            rates = evaluate(model, tokenizer, letters=letters, count=_EVALUATED_PROBLEMS, thinking=thinking)
            evaluation.append({"thinking": thinking} | asdict(rates))
            logger.info("%s", evaluation[-1])

    kept = [entry for entry in history if entry["step"] == 1 or entry["step"] % 10 == 0]
    save_trained(
        options.output,
        model,
        tokenizer,
        seed=options.seed,
        steps=options.steps,
        seconds=seconds,
        num_parameters=model.num_parameters(),
        evaluation=evaluation,
        history=[{"step": entry["step"], "loss": round(entry["loss"], 4)} for entry in kept],
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
