"""Train all sizes of an elastic checkpoint by distillation from the checkpoint itself, or from another teacher.

CONFIG is a YAML file with the fields below and any field of ElasticDistillationConfig (a trl SFTConfig with budget_probabilities, stages,
temperature, ...). The same fields can follow as options and win over the file. Several processes: torchrun --nproc-per-node 8 -m
hf_elastic.cli train CONFIG.

  hf-elastic train recipe.yaml
  hf-elastic train recipe.yaml --learning_rate 5e-5 --output_dir out2
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ElasticConfigError
from .elastify import load_calibration


@dataclass
class TrainArguments:
    """What is trained on what.

    Args:
        model (`str`): Elastic checkpoint: folder or Hub repository.
        dataset (`str`): File (.jsonl, .json, .parquet, .csv, .txt), folder of `datasets.save_to_disk`, or Hub dataset.
        teacher (`str`, *optional*): Defaults to the model as it is at the start.
        dataset_split (`str`, *optional*, defaults to `"train"`): Split of a Hub dataset.
        eval_dataset (`str`, *optional*): Like `dataset`.
        dtype (`str`, *optional*, defaults to `"auto"`): Type of the weights.
        resume (`bool`, *optional*, defaults to `False`): Go on from the last checkpoint in `output_dir`.
    """

    model: str = field(default="", metadata={"help": "Elastic checkpoint: folder or Hub repository."})
    dataset: str = field(default="", metadata={"help": "File, folder of save_to_disk, or Hub dataset."})
    teacher: str | None = field(
        default=None, metadata={"help": "Teacher; the model as it is at the start by default."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Like dataset."})
    dtype: str = field(default="auto", metadata={"help": "Type of the weights."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="--FIELD VALUE", help="fields that win over the file"
    )


def run(args: argparse.Namespace) -> None:
    if not Path(args.config).is_file():
        raise ElasticConfigError(f"there is no file {args.config}.")
    train_arguments, config = parse(args.config, args.overrides)
    for name in ("model", "dataset"):
        if not getattr(train_arguments, name):
            raise ElasticConfigError(f"{args.config} does not say {name}.")
    train(train_arguments, config)


def parse(config: str, overrides: list[str]) -> tuple[TrainArguments, Any]:
    """Read a YAML file and options.

    Returns:
        `tuple[TrainArguments, ElasticDistillationConfig]`
    """
    from trl import TrlParser

    from ..trainers import ElasticDistillationConfig

    parser = TrlParser((TrainArguments, ElasticDistillationConfig))
    train_arguments, distillation = parser.parse_args_and_config(["--config", config, *overrides])
    return train_arguments, distillation


def train(arguments: TrainArguments, config: Any) -> None:
    """Train and save to `output_dir`."""
    from transformers import AutoTokenizer

    from ..modeling_elastic import ElasticForCausalLM
    from ..trainers import ElasticDistillationTrainer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = ElasticForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    evaluation = arguments.eval_dataset
    trainer = ElasticDistillationTrainer(
        model=model,
        teacher_model=arguments.teacher,
        args=config,
        train_dataset=load_calibration(arguments.dataset, arguments.dataset_split),
        eval_dataset=load_calibration(evaluation, arguments.dataset_split) if evaluation else None,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    trainer.save_model()
    tokenizer.save_pretrained(config.output_dir)
