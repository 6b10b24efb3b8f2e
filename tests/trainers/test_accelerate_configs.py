"""The files for `accelerate launch`: accelerate reads them, and they say what the trainer requires. Nothing is launched here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from runs import family

from hf_elastic import ElasticConfigError, trainers
from hf_elastic.trainers.teacher import prepare_teacher

FOLDER = Path(trainers.__file__).parent / "recipes" / "accelerate"
TYPES = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}


def test_every_file_is_tested():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_reads_them(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == TYPES[name]
    assert (config.mixed_precision, config.num_processes, config.use_cpu) == ("bf16", 8, False)
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"accelerate launch --config_file {name}.yaml" in text
    assert "Not for CPUs" in text


def launched(name: str) -> tuple[SimpleNamespace, dict[str, str]]:
    """What `accelerate launch` makes of a file: its arguments, and the environment of the processes."""
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), "-m", "hf_elastic.cli", "train", "recipe.yaml"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    environment = prepare_multi_gpu_env(args)
    return args, {key: value for key, value in environment.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def test_ddp_starts_one_process_per_gpu_without_sharding():
    args, environment = launched("ddp")
    assert (args.multi_gpu, args.use_fsdp, args.num_processes) == (True, False, 8)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert "ACCELERATE_USE_FSDP" not in environment


def test_fsdp2_is_what_the_trainer_requires(monkeypatch):
    args, environment = launched("fsdp2")
    assert args.use_fsdp
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None  # then accelerate takes the model's own
    assert {type(layer).__name__ for layer in family().model.layers} <= set(family()._no_split_modules)
    assert plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fsdp_version": 1}, "FSDP 1 flattens parameters.*set fsdp_version to 2"),
        (
            {"fsdp_version": 2, "cpu_ram_efficient_loading": True},
            "leaves the teacher without weights.*set it to false",
        ),
    ],
)
def test_sharding_that_would_go_wrong_is_refused(fields, message):
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**fields)))
    with pytest.raises(ElasticConfigError, match=message):
        prepare_teacher(family(), accelerator, fsdp=True)
