"""What a quantised checkpoint says of itself to other programs: `quantization_config` of `config.json`, in the words of compressed-tensors or of modelopt.

```python
quantization_config(elastic.encodings, elastic.architecture, elastic.parent_config)
```

compressed-tensors matches names of modules, of the live model in transformers and of its own model in vLLM: what is written are patterns that begin
at the layer. Readers of modelopt match the names of the Hub repository, with wildcards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from transformers import PreTrainedConfig

from .._version import __version__
from ..architectures import Architecture
from ..architectures.axes import TensorRule
from ..architectures.coded_programs import Coded, CodedLayout
from ..architectures.encodings import ENCODINGS, NVFP4_BLOCK, Encoding
from ..architectures.hosts import Host
from ..configuration_elastic import ElasticConfig
from ..errors import ElasticConfigError, ExportError, did_you_mean, shown

LAYOUTS: tuple[CodedLayout, ...] = ("compressed-tensors", "modelopt")
MODELOPT_FILE = "hf_quant_config.json"
"""Which readers of modelopt's layout look for beside `config.json`."""

_WEIGHTS: dict[str, dict[str, Any]] = {
    "nvfp4": {
        "num_bits": 4,
        "strategy": "tensor_group",
        "group_size": NVFP4_BLOCK,
        "scale_dtype": "torch.float8_e4m3fn",
    },
    "fp8": {"num_bits": 8, "strategy": "channel"},
    "fp8-tensor": {"num_bits": 8, "strategy": "tensor"},
}
_FORMATS = {"nvfp4": "nvfp4-pack-quantized", "fp8": "float-quantized"}
_COMMON = {"type": "float", "symmetric": True, "dynamic": False}
_PER_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
_RELABELLED = {
    "compressed-tensors": {"nvfp4-modelopt": "nvfp4"},
    "modelopt": {"nvfp4": "nvfp4-modelopt", "nvfp4-modelopt": "nvfp4-modelopt"},
}


def check_coded_layout(layout: Any) -> CodedLayout:
    """A layout of quantised checkpoints, or [`ElasticConfigError`]."""
    if layout not in LAYOUTS:
        raise ElasticConfigError(
            f"layout={shown(layout)} must be {' or '.join(map(repr, LAYOUTS))}.{did_you_mean(str(layout), LAYOUTS)}"
        )
    return layout  # type: ignore[no-any-return]


def stored_layout(encodings: Mapping[str, Encoding]) -> CodedLayout:
    """The layout that codes and scales are in."""
    modelopt = any(encoding.name == "nvfp4-modelopt" for encoding in encodings.values())
    return "modelopt" if modelopt else "compressed-tensors"


def coded_in(encodings: Mapping[str, Encoding]) -> Coded:
    """What an export is stored in that has codes and scales as they are."""
    return Coded(encodings, stored_layout(encodings))


def in_layout(encoding: Encoding, layout: CodedLayout) -> Encoding:
    """The encoding in which a layout holds the same codes and scales.

    Raises:
        `ExportError`: it has none.
    """
    relabelled = _RELABELLED[layout]
    if layout == "modelopt" and encoding.name not in relabelled:
        raise ExportError(
            f"modelopt's layout has no place for {encoding.name}: its FP8 has one scale for a whole matrix and one, measured on data, for what goes "
            "in. Write layout='compressed-tensors', or bfloat16 (quantized=False)."
        )
    return ENCODINGS[relabelled.get(encoding.name, encoding.name)]


def quantization_config(
    encodings: Mapping[str, Encoding],
    architecture: Architecture,
    config: PreTrainedConfig,
    layout: CodedLayout = "compressed-tensors",
    host: Host | None = None,
) -> dict[str, Any]:
    """What `config.json` of a quantised checkpoint says under `quantization_config`.

    NVFP4 is for weights alone (W4A16). FP8 has activations in FP8 too, scaled per token while a program runs, since most that read it know FP8 no
    other way; weights are the same without.

    Args:
        encodings (`dict[str, Encoding]`): By the names of the weights in the live model of this config.
        architecture (`Architecture`): Its table.
        config (`PreTrainedConfig`): Its stock config: of the size that is written.
        layout (`str`, *optional*, defaults to `"compressed-tensors"`): Or `"modelopt"`, which needs [`modelopt_file`] as well.
        host ([`Host`], *optional*): The larger model that the checkpoint is, if it is one; nothing else of it is quantised.

    Raises:
        `ElasticConfigError`: no such layout.
        `ExportError`: the layout does not hold one of the encodings.
    """
    layout = check_coded_layout(layout)
    written = {name: in_layout(encoding, layout) for name, encoding in encodings.items()}
    rules = [rule for rule in architecture.rules(config) if _is_matrix(rule)]
    if layout == "modelopt":
        return _modelopt(written, rules, architecture, host)
    plain = [rule for rule in rules if rule.stored.name not in written]
    groups = {name: [r for r in rules if _encoded(r, written) == name] for name in _WEIGHTS}
    groups = {name: members for name, members in groups.items() if members}
    schemes = {}
    for i, (name, members) in enumerate(groups.items()):
        encoding = ENCODINGS[name]
        schemes[f"group_{i}"] = {
            "targets": ["Linear"] if len(groups) == 1 else _patterns(members, architecture, r"\.\d+\..*"),
            "weights": _COMMON | _WEIGHTS[name],
            "input_activations": _PER_TOKEN if encoding.format == "fp8" else None,
            "format": _FORMATS[encoding.format],
        }
    formats = {scheme["format"] for scheme in schemes.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": schemes,
        "ignore": _patterns(plain, architecture, r"(\..*)?$")
        + ([] if host is None else [_beside(name) for name in host.passengers]),
    }


def encodings_said(
    said: Mapping[str, Any], architecture: Architecture, config: PreTrainedConfig
) -> dict[str, Encoding]:
    """The encodings that `quantization_config` gives, for a section that it made: by the names of the weights in the live model of a stock config."""
    found = {}
    for rule in architecture.rules(config):
        if rule.kind is None or rule.copy_of is not None:
            continue
        *_, module = [name.format(layer=rule.layer, use=rule.use) for name in _modules(rule)]
        inside = f"{module}.0.up_proj" if _is_stack(rule) else module
        if said["quant_method"] == "modelopt":
            if not any(fnmatchcase(inside, pattern) for pattern in said["ignore"]):
                found[rule.name] = ENCODINGS["nvfp4-modelopt"]
        elif not _matches(inside, said["ignore"]):
            for group in said["config_groups"].values():
                if group["targets"] == ["Linear"] or _matches(inside, group["targets"]):
                    found[rule.name] = ENCODINGS[_name_of(group["weights"])]
    return found


def with_said(elastic: ElasticConfig, exported: PreTrainedConfig) -> ElasticConfig:
    """The elastic config of an export, with the encodings that its `config.json` gives."""
    said = getattr(exported, "quantization_config", None)
    if not said:
        return elastic
    said = said if isinstance(said, dict) else said.to_dict()
    return elastic.quantized(encodings_said(said, elastic.architecture, elastic.parent_config))


def _matches(module: str, patterns: Iterable[str]) -> bool:
    return any(re.match(pattern.removeprefix("re:"), module) for pattern in patterns)


def _name_of(weights: Mapping[str, Any]) -> str:
    facts = ("num_bits", "strategy")
    return next(name for name, known in _WEIGHTS.items() if all(known[fact] == weights[fact] for fact in facts))


def relabelled(scales: torch.Tensor, source: Encoding) -> torch.Tensor | None:
    """Global scales of NVFP4 in the words of the other layout: factors for the divisors of compressed-tensors, divisors for the factors of modelopt.

    Args:
        scales (`torch.Tensor`): float32 of any shape.
        source ([`Encoding`]): Whose they are.

    Returns:
        `torch.Tensor`: Of that shape, the numbers in float32 next to `1 / x` with which every code at every scale of a block becomes the same weight in
            bfloat16; `None` if there is none for one of them.
    """
    given = scales.float().flatten()
    steps = torch.tensor([0, 1, -1, 2, -2, 3, -3], dtype=torch.int32)
    tried = ((1 / given).view(torch.int32)[:, None] + steps).view(torch.float32)  # [scales, candidates]
    blocks = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = torch.tensor([1.0, 1.5])  # the others are these, times powers of 2

    def weights(scale: torch.Tensor, divides: bool) -> torch.Tensor:
        step = blocks / scale[..., None] if divides else blocks * scale[..., None]
        return (codes * step[..., None]).bfloat16()

    divides = source.name == "nvfp4"
    same = (weights(tried, not divides) == weights(given, divides)[:, None]).all(-1).all(-1)
    if not same.any(-1).all():
        return None
    return tried.gather(-1, same.int().argmax(-1, keepdim=True)).view(scales.shape)


def modelopt_file(said: Mapping[str, Any]) -> dict[str, Any]:
    """What `hf_quant_config.json` says, from the `quantization_config` of modelopt's layout."""
    return {
        "producer": said["producer"],
        "quantization": {
            "quant_algo": said["quant_algo"],
            "kv_cache_quant_algo": None,
            "group_size": said["group_size"],
            "exclude_modules": said["ignore"],
        },
    }


def _modelopt(
    written: Mapping[str, Encoding], rules: Sequence[TensorRule], architecture: Architecture, host: Host | None
) -> dict[str, Any]:
    plain = [
        name for rule in rules if rule.stored.name not in written for name in _hub_names(rule, architecture, host)
    ]
    return {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_NVFP4",
        "group_size": NVFP4_BLOCK,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "float", "dynamic": False, "group_size": NVFP4_BLOCK},
                "input_activations": None,
            }
        },
        "ignore": list(dict.fromkeys(plain)) + ([] if host is None else [f"{name}*" for name in host.passengers]),
        "producer": {"name": "hf_elastic", "version": __version__},
    }


def _is_matrix(rule: TensorRule) -> bool:
    """Whether it is the weight of what some program may take for a linear layer: convolutions are one to some."""
    return len(rule.dims) > 1 and (rule.kind is not None or rule.name.endswith(".weight"))


def _encoded(rule: TensorRule, written: Mapping[str, Encoding]) -> str | None:
    encoding = written.get(rule.stored.name)
    return None if encoding is None else encoding.name


def _modules(rule: TensorRule) -> Iterator[str]:
    """Templates of the modules that have a weight: in the live model, and in the repository. Of experts the module of all of them."""
    yield rule.template.rpartition(".")[0]
    if rule.disk is not None and (rule.stacked or not _is_stack(rule)):
        yield (
            rule.disk.partition(".{expert}")[0]
            if rule.stacked
            else rule.disk.removesuffix(".weight").replace(".{segment}", "")
        )


def _patterns(rules: Sequence[TensorRule], architecture: Architecture, stack: str) -> list[str]:
    """Regular expressions for the modules of some weights: those that differ by the layer alone are one.

    Args:
        stack (`str`): What follows the name of the module of experts. They are modules of their own to some, and to others it is one module.
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for rule in rules:
        for module in _modules(rule):
            key = _from_layer(module, architecture).replace("{use}", str(rule.use)), stack if _is_stack(rule) else "$"
            layers.setdefault(key, []).append(str(rule.layer))
    patterns: dict[str, Any] = {}
    for (module, end), numbers in layers.items():
        number = "|".join(dict.fromkeys(numbers))
        spelled = re.escape(module).replace(r"\{layer\}", f"({number})" if "|" in number else number)
        patterns[rf"re:(.*\.)?{spelled}{end}"] = None
    return list(patterns)


def _is_stack(rule: TensorRule) -> bool:
    return len(rule.dims) > 2 and rule.kind is not None


def _from_layer(module: str, architecture: Architecture) -> str:
    """A name without what programs call the model that holds the layers."""
    for prefix in (architecture.layers_path.partition(".")[0] + ".", architecture.disk_prefix):
        module = module.removeprefix(prefix)
    return module


def _beside(prefix: str) -> str:
    return rf"re:(.*\.)?{re.escape(prefix.removeprefix('model.'))}.*"


def _hub_names(rule: TensorRule, architecture: Architecture, host: Host | None) -> Iterator[str]:
    """Names of the modules of a weight in the repository; a wildcard for all that is in them."""
    for module in [*_modules(rule)][-1:]:
        name = module.format(layer=rule.layer, use=rule.use)
        if host is not None and name.startswith(architecture.disk_prefix):
            name = host.prefix + name.removeprefix(architecture.disk_prefix)
        yield f"{name}*" if _is_stack(rule) else name
