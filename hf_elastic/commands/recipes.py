"""Recipes of `hf-elastic train`: the shipped ones by name, what a recipe need not say, and what a run says of itself."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import ElasticConfigError, did_you_mean
from .common import table

PLACEHOLDERS = ("MODEL", "DATA")
"""What shipped recipes say where only the user knows: to be given as options, or in a copy."""


def shipped() -> dict[str, Path]:
    """The recipes in the package, by name."""
    folder = Path(str(resources.files("hf_elastic.trainers"))) / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> str:
    """A file, or the shipped recipe of this name.

    Raises:
        `ElasticConfigError`: there is neither.
    """
    if Path(name).is_file():
        return name
    known = shipped()
    if name.removesuffix(".yaml") in known:
        path = known[name.removesuffix(".yaml")]
        print(f"recipe: {path}", file=sys.stderr)
        return str(path)
    raise ElasticConfigError(
        f"there is no file {name}, and no recipe of this name in the package, which has {', '.join(known)}.{did_you_mean(name, known)}"
    )


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a recipe that neither it nor the options give, where they differ from those of trl.

    Args:
        given: What is given. A value of `None`, which is a key of YAML without one, is not given.
    """
    peft = _is_true(given.get("use_peft"))
    # Small steps are lost in bfloat16 weights; those of an adapter are in float32 whatever the weights under it are.
    values: dict[str, Any] = {"learning_rate": 2e-4 if peft else 1e-4, "dtype": "auto" if peft else "float32"}
    if given.get("eval_dataset") and given.get("eval_strategy") is None:  # who says when says all of it
        values |= {"eval_strategy": "epoch" if given.get("eval_steps") is None else "steps", "eval_on_start": True}
    return {name: value for name, value in values.items() if given.get(name) is None}


def _is_true(value: Any) -> bool:
    """Whether upstream's parser takes a value for true; what it will refuse is not."""
    from transformers.hf_argparser import string_to_bool

    try:
        return string_to_bool(value) if isinstance(value, str) else bool(value)
    except argparse.ArgumentTypeError:
        return False


def check_placeholders(config: str, arguments: Any) -> None:
    """Refuse the words that a shipped recipe has where only the user knows what to write."""
    for name in ("model", "dataset", "teacher"):
        value = getattr(arguments, name)
        if value in PLACEHOLDERS and not Path(value).exists():
            raise ElasticConfigError(
                f"{config}: {name}: {value} stands for yours; write it there, or give --{name} FOLDER_OR_HUB_NAME."
            )


def tell_before(trainer: Any, model: str) -> str:
    """What a run will do, with the values that the user may not have given."""
    args = trainer.args
    adapted = "an adapter" if trainer._adapted else "all weights"
    count, unit = (args.max_steps, "step") if args.max_steps > 0 else (args.num_train_epochs, "epoch")
    how_long = f"{count:g} {unit}{'' if count == 1 else 's'}"
    length = "rows as they are" if args.max_length is None else f"rows of up to {args.max_length:,} tokens"
    stages = trainer.curriculum.stages
    drawn = ", ".join(f"{name} {share:.0%}" for name, share in stages[0].budget_probabilities.items())
    more = f" (then {len(stages) - 1} more stages)" if len(stages) > 1 else ""
    return (
        f"Training {adapted} of {model}: {how_long} of {args.rows_per_step} rows, {length}, learning rate {args.learning_rate:g}, "
        f"{'bf16' if args.bf16 else 'fp16' if args.fp16 else 'float32'} arithmetic.\n"
        f"Every micro-batch trains one size, drawn so often: {drawn}{more}. In the logs NAME/kl is how far that size is from its teacher, in nats per "
        "token: it falls; that of the whole model stays near 0."
    )


def tell_after(trainer: Any, output: str, merged: bool) -> str:
    """Where a run was saved, how near every size has come, and what to do next."""
    rows = [["size", "kl at first", "kl at last"]]
    history = trainer.state.log_history
    for name in trainer._elastic.elastic_config.family():
        for prefix in (f"eval_{name}/kl", f"{name}/kl"):
            if found := [entry[prefix] for entry in history if prefix in entry]:
                rows.append([name, f"{found[0]:.4f}", f"{found[-1]:.4f}"])
                break
    said = [table(rows, frozenset({1, 2}))] if len(rows) > 1 else []
    folder = f"{output}/merged" if merged else output
    if trainer._adapted and not merged:
        said.append(
            f"Saved to {output}: an adapter, without the family. For that merge it: merge_adapter: true, or PeftModel.from_pretrained(family, "
            f"{output!r}).merge_and_unload()."
        )
    elif (recipe := trainer.args.quantization) is not None:
        how = (
            f"--format {recipe}"
            if isinstance(recipe, str)
            else f"--recipe FILE, with {json.dumps(recipe)} in FILE.json"
        )
        said.append(
            f"Saved to {folder}: the weights that were rounded, not rounded. Next: hf-elastic quantize {folder} {folder}-quantized {how}"
        )
    else:
        said.append(
            f"Saved to {folder}. Next: hf-elastic plan {folder}; hf-elastic push {folder} NAME/OF-THE-REPOSITORY"
        )
    return "\n".join(said)
