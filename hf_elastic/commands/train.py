"""Train all sizes of an elastic checkpoint by distillation from the checkpoint itself, or from another teacher.

CONFIG is a YAML file. The least that it says is

  model: family
  dataset: chats.jsonl
  output_dir: trained

Data are rows as for `hf-elastic elastify`. It takes model, dataset, and optionally teacher, dataset_split, eval_dataset, dtype, resume; any
field of ElasticDistillationConfig (a trl SFTConfig with budget_probabilities, stages, temperature, ...); and with use_peft the fields of
LoRA as in trl: lora_r, lora_alpha, lora_target_modules, lora_target_parameters, .... With LoRA output_dir gets an adapter; `merge_adapter:
true` writes the trained family beside it, in output_dir/merged. The same fields can follow as options and win over the file.

The log has one number per size, NAME/kl: how far it is from the teacher, in nats per token. It should fall.

  hf-elastic train recipe.yaml
  hf-elastic train recipe.yaml --learning_rate 5e-5 --output_dir trained2
  torchrun --nproc-per-node 8 -m hf_elastic.cli train recipe.yaml
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import re
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..errors import ElasticConfigError, did_you_mean
from .common import check_dtype, check_source, load_tokenizer
from .elastify import load_calibration
from .recipes import check_placeholders, defaults, find_recipe, tell_after, tell_before


@dataclass
class TrainArguments:
    """What is trained on what.

    Args:
        model (`str`): Elastic checkpoint: folder or Hub repository.
        dataset (`str`): File (.jsonl, .json, .parquet, .csv, .txt), folder of `datasets.save_to_disk`, or Hub dataset.
        teacher (`str`, *optional*): Defaults to the model as it is at the start.
        dataset_split (`str`, *optional*, defaults to `"train"`): Split of a Hub dataset.
        eval_dataset (`str`, *optional*): Like `dataset`.
        dtype (`str`, *optional*): Type of the weights; the checkpoint's (`"auto"`) if only an adapter is trained, else float32.
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


@dataclass
class AdapterArguments:
    """Train an adapter instead of all weights; names as in `trl.ModelConfig`.

    Args:
        use_peft (`bool`, *optional*, defaults to `False`): Train a LoRA adapter; `output_dir` gets the adapter.
        lora_r (`int`, *optional*, defaults to 16): Rank.
        lora_alpha (`int`, *optional*, defaults to 32): Scales the product by `alpha / r`.
        use_rslora (`bool`, *optional*, defaults to `False`): Scale it by `alpha / sqrt(r)`.
        lora_dropout (`float`, *optional*, defaults to 0.0): Of linear layers; peft has none for experts.
        lora_targets (`str`, *optional*): `auto` adapts everything that can be: all linear layers of the blocks, experts included, whatever
            they are called in this model. Instead of the next two.
        lora_target_modules (`list[str]`, *optional*): Linear layers; the projections of attention by default.
        lora_target_parameters (`list[str]`, *optional*): Experts and routers, such as `mixer.experts.up_proj`.
        merge_adapter (`bool`, *optional*, defaults to `False`): Save the family with the adapter merged, too, in `output_dir/merged`.
    """

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Scales the product by alpha / r."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale it by alpha / sqrt(r)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Of linear layers; peft has none for experts."})
    lora_targets: str | None = field(
        default=None, metadata={"help": "auto: all linear layers of the blocks, experts included."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Linear layers; the projections of attention by default."}
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Experts and routers, such as mixer.experts.up_proj."}
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "Save the family with the adapter merged, too, in output_dir/merged."}
    )

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default and f.name != "use_peft"]
        if given and not self.use_peft:
            raise ElasticConfigError(f"{', '.join(given)} would be ignored without use_peft: true.")
        if self.lora_targets not in (None, "auto"):
            raise ElasticConfigError(
                f"lora_targets={self.lora_targets!r} must be auto; name single modules in lora_target_modules."
            )
        if self.lora_targets and self.lora_target_modules:
            raise ElasticConfigError(
                f"give either lora_targets: auto or lora_target_modules ({self.lora_target_modules}), not both."
            )

    def peft_config(self) -> Any:
        """The `peft.LoraConfig`; `None` if all weights are trained."""
        from trl import ModelConfig, get_peft_config

        own = ("merge_adapter", "lora_targets")
        config = get_peft_config(
            ModelConfig(**{f.name: getattr(self, f.name) for f in fields(self) if f.name not in own})
        )
        if config is not None:
            names: Any = self.lora_targets or self.lora_target_modules
            if isinstance(names, list) and len(names) == 1:
                names = names[0]  # an option makes a list of a pattern, too
            if isinstance(names, str) and re.fullmatch(r"[\w.]+", names) and names != "auto":
                names = [names]
            config.target_modules = names  # upstream takes one name for a pattern of whole paths
        return config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="--FIELD VALUE", help="fields that win over the file"
    )


def run(args: argparse.Namespace) -> None:
    args.config = find_recipe(args.config)
    if importlib.util.find_spec("trl") is None:
        raise ImportError("training needs trl: pip install 'hf-elastic[train]'")
    train_arguments, adapter, config = parse(args.config, args.overrides)
    for name in ("model", "dataset", "teacher", "dataset_split", "eval_dataset", "dtype"):
        if not isinstance(value := getattr(train_arguments, name), (str, type(None))):
            raise ElasticConfigError(f"{args.config}: {name}={value!r} must be a text.")
    for name in ("model", "dataset"):
        if not getattr(train_arguments, name):
            raise ElasticConfigError(f"{args.config} does not say {name}.")
    check_placeholders(args.config, train_arguments)
    train_arguments.dtype = check_dtype(train_arguments.dtype, f"{args.config}: dtype")
    train(train_arguments, adapter, config)


def parse(config: str, overrides: list[str]) -> tuple[TrainArguments, AdapterArguments, Any]:
    """Read a YAML file and options.

    Returns:
        `tuple[TrainArguments, AdapterArguments, ElasticDistillationConfig]`

    Raises:
        `ElasticConfigError`: the file is no YAML, or a field is of the wrong kind.
    """
    import yaml
    from trl import TrlParser

    from ..trainers import ElasticDistillationConfig

    parts: Any = (TrainArguments, AdapterArguments, ElasticDistillationConfig)
    parser = TrlParser(parts)
    parser.allow_abbrev = False  # the defaults depend on options, which they look up by their names
    said = io.StringIO()
    try:
        known = [f.name for part in parts for f in fields(part) if f.init]
        # As options, because an empty value in the file would win over a default of the parser.
        unsaid = [
            f"--{name}={value}" for name, value in defaults(_check_keys(config, known) | _options(overrides)).items()
        ]
        with redirect_stderr(said):
            read = parser.parse_args_and_config(["--config", config, *unsaid, *overrides])
        train_arguments, adapter, distillation = read
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ElasticConfigError(f"{config} is no YAML: {' '.join(str(error).split())}") from error
    except (TypeError, AttributeError) as error:  # what upstream raises where it calculates with a value
        raise ElasticConfigError(f"{config} has a field of the wrong kind: {error}.") from error
    except ValueError as error:
        if isinstance(error, ElasticConfigError):
            raise
        if unused := re.search(r"not used by the HfArgumentParser: \['(-*([^=']+))", str(error)):
            hint = did_you_mean(unused[2].replace("-", "_"), known)
            raise ElasticConfigError(
                f"unknown option {unused[1]}; options are the fields of the recipe.{hint}"
            ) from error
        if "bf16" not in str(error):
            raise
        raise ElasticConfigError(
            f"{config}: training in bf16 needs a device that has it, and there is none here or use_cpu is set; "
            "write bf16: false."
        ) from error
    except SystemExit as error:  # argparse prints all fields, and what is wrong at the end
        if not error.code:
            raise
        raise ElasticConfigError(f"{config}: {said.getvalue().strip().rpartition('error: ')[2]}") from error
    print(said.getvalue(), end="", file=sys.stderr)
    for parsed in (train_arguments, adapter, distillation):
        for name, kind in get_type_hints(type(parsed)).items():
            kinds, value = {*get_args(kind)} or {kind}, getattr(parsed, name, None)
            if kinds <= {int, float, type(None)} and not isinstance(value, (int, float, type(None))):
                raise ElasticConfigError(f"{config}: {name}={value!r} must be a number.")
    return train_arguments, adapter, distillation


def _options(overrides: list[str]) -> dict[str, str]:
    """Options as `--field value`, `--field=value` or, for what is true, `--field`, with `-` or `_` in the name."""
    pairs = zip(overrides, [*overrides[1:], "--"], strict=False)
    named = [(o.lstrip("-").partition("="), after) for o, after in pairs if o.startswith("--")]
    return {
        name.replace("-", "_"): value if equals else "true" if after.startswith("--") else after
        for (name, equals, value), after in named
    }


def _check_keys(config: str, known: list[str]) -> dict[str, Any]:
    """What is written. Refuses keys that no field has, before upstream looks at the values; it would speak of its dataclasses."""
    import yaml

    written = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    if not isinstance(written, dict):
        raise ElasticConfigError(f"{config} holds {type(written).__name__}, it must hold lines of KEY: VALUE.")
    for key in written:
        if key not in known and key != "env":
            first = ", ".join(f.name for f in fields(TrainArguments))
            raise ElasticConfigError(
                f"unknown key {key!r} in {config}; it takes {first}, and the fields of LoRA and of ElasticDistillationConfig."
                f"{did_you_mean(key, known)}"
            )
    return written


def train(arguments: TrainArguments, adapter: AdapterArguments, config: Any) -> None:
    """Train and save to `output_dir`."""
    from ..checkpoints.replacing import replacing
    from ..modeling_elastic import ElasticForCausalLM
    from ..routing.decisions import render
    from ..storage.checksums import has_checksums
    from ..trainers import ElasticDistillationTrainer
    from ..trainers.reporting import EvaluateAtTheEnd
    from ..trainers.routing import REPORT_FILE

    for source in (arguments.model, arguments.teacher):
        if source is not None:
            check_source(source)
    streaming = config.max_steps > 0  # what is streamed has no length, and epochs need one
    data = load_calibration(arguments.dataset, arguments.dataset_split, streaming=streaming)
    tokenizer = load_tokenizer(arguments.model)
    model = ElasticForCausalLM.from_pretrained(
        arguments.model, dtype=arguments.dtype, verify=has_checksums(arguments.model)
    )
    evaluation = arguments.eval_dataset
    trainer = ElasticDistillationTrainer(
        model=model,
        teacher_model=arguments.teacher,
        args=config,
        train_dataset=data,
        eval_dataset=load_calibration(evaluation, arguments.dataset_split, streaming=streaming)
        if evaluation
        else None,
        processing_class=tokenizer,
        peft_config=adapter.peft_config(),
    )
    if config.eval_strategy == "no":  # said so: see `defaults`
        trainer.remove_callback(EvaluateAtTheEnd)
    if adapter.merge_adapter and trainer.is_fsdp_enabled:
        raise ElasticConfigError(
            "merge_adapter needs whole weights, which FSDP shards; merge the saved adapter after the run."
        )
    if trainer.is_world_process_zero():
        print(tell_before(trainer, arguments.model), flush=True)
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    trainer.save_model()
    if trainer.is_world_process_zero():
        with replacing(config.output_dir) as folder:
            tokenizer.save_pretrained(folder)
    if trainer.routing is not None and trainer.is_world_process_zero():
        print(f"the router decided (see {Path(config.output_dir) / REPORT_FILE}):\n{render(trainer.routing.report)}")
    if adapter.merge_adapter and trainer.is_world_process_zero():
        merged = Path(config.output_dir) / "merged"
        with replacing(merged) as folder:
            trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    if trainer.is_world_process_zero():
        print(tell_after(trainer, config.output_dir, adapter.merge_adapter))
