"""Tiny families whose sizes are whole blocks, and checkpoints of them in few bits, written from the definition of the layouts and not by the package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cases import granite, nemotron, randomize
from safetensors.torch import save_file
from transformers import (
    GraniteMoeHybridForCausalLM,
    NemotronHForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_elastic import ElasticConfig
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.encodings import ENCODINGS, Encoding
from hf_elastic.architectures.pieces import pieces
from hf_elastic.quantization.codec import encode, global_scale_of
from hf_elastic.quantization.recipes import fused_groups, resolve_recipe

_WIDE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "nemotron": lambda: nemotron(
        "ME*EM-*E",
        **_WIDE,
        head_dim=16,
        intermediate_size=64,
        mamba_num_heads=4,
        mamba_head_dim=32,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=48,
        n_routed_experts=8,
        dtype="bfloat16",
    ),
    "granite": lambda: granite(
        **_WIDE,
        intermediate_size=32,
        shared_intermediate_size=48,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_expand=4,
        dtype="bfloat16",
    ),
}
BUDGETS: dict[str, dict[str, dict[str, Any]]] = {
    "nemotron": {
        "half": {"hidden": 48, "expert_ffn": 16, "shared_expert_ffn": 32, "ffn": 48},
        "small": {"hidden": 32, "expert_ffn": 16, "shared_expert_ffn": 16, "ffn": 32, "layers": [0, 1, 2, 5]},
    },
    "granite": {
        "half": {"hidden": 32, "expert_ffn": 16, "shared_expert_ffn": 32},
        "small": {"hidden": 16, "expert_ffn": 16, "shared_expert_ffn": 16, "layers": [0, 1]},
    },
}
_CLASSES = {"nemotron_h": NemotronHForCausalLM, "granitemoehybrid": GraniteMoeHybridForCausalLM}


@cache
def family(name: str, seed: int = 0) -> tuple[PreTrainedModel, ElasticConfig]:
    """A stock parent in bfloat16 in which every tensor is random, and the config of a family of it; not to be changed."""
    config = CONFIGS[name]()
    model = _CLASSES[config.model_type](config).eval()
    randomize(model, seed)
    model = model.to(torch.bfloat16)
    architecture = get_architecture(config.model_type)
    with torch.no_grad():
        for rule in architecture.rules(config):
            if rule.fp32:  # as the stock loader holds it
                owner, _, tensor = rule.name.rpartition(".")
                module = model.get_submodule(owner)
                setattr(module, tensor, torch.nn.Parameter(getattr(module, tensor).float()))
    model.config.dtype = torch.bfloat16
    return model, ElasticConfig.from_parent(model.config, BUDGETS[name])


_codes: dict[tuple[int, tuple[tuple[str, str], ...]], dict[str, tuple[torch.Tensor, ...]]] = {}


def codes_of(model: PreTrainedModel, encodings: Mapping[str, Encoding]) -> dict[str, tuple[torch.Tensor, ...]]:
    """The companions of every encoded weight, in the order of its encoding; matrices that others fuse have one global scale."""
    key = (
        id(model),
        tuple((name, encoding.name) for name, encoding in encodings.items()),
    )  # models of `family` live on
    if key not in _codes:
        _codes[key] = _made_codes(model, encodings)
    return _codes[key]


def _made_codes(model: PreTrainedModel, encodings: Mapping[str, Encoding]) -> dict[str, tuple[torch.Tensor, ...]]:
    architecture, config, state = get_architecture(model.config.model_type), model.config, model.state_dict()
    made: dict[str, tuple[torch.Tensor, ...]] = {}
    for group in fused_groups(rule for rule in architecture.rules(config) if rule.name in encodings):
        shared = global_scale_of(*(state[rule.name] for rule in group))
        for rule in group:
            encoding, weight = encodings[rule.name], state[rule.name]
            if encoding.format == "nvfp4":
                codes, scale, last = encode(weight, "nvfp4", global_scale=shared)
                last = 1 / last if encoding.name == "nvfp4-modelopt" else last
                made[rule.name] = codes, scale, last
            elif encoding.name == "fp8-tensor":
                one = weight.abs().amax((-2, -1), keepdim=True).float() / 448
                made[rule.name] = (weight.float() / one).to(torch.float8_e4m3fn), one.squeeze(-1)
            else:
                made[rule.name] = encode(weight, "fp8")
    return made


def tensors_of(
    model: PreTrainedModel, encodings: Mapping[str, Encoding], scalars: bool = False, renamed: bool = False
) -> dict[str, torch.Tensor]:
    """What the file of a checkpoint in the Hub's layout holds, by name.

    Args:
        scalars (`bool`, *optional*, defaults to `False`): Scales of whole matrices have no dimensions, as modelopt writes them.
        renamed (`bool`, *optional*, defaults to `False`): Encoded weights have the names that other programs give them.
    """
    architecture, config, state = get_architecture(model.config.model_type), model.config, model.state_dict()
    coded, content = codes_of(model, encodings), {}
    for piece in pieces(architecture, config, architecture.full(config)):
        rule = piece.rule
        if rule.copy_of:
            continue
        encoding = encodings.get(rule.name)
        if renamed and encoding is not None and rule.coded is not None:
            rule = replace(rule, disk=rule.coded)
        parts = [(rule, state[rule.name])]
        if encoding is not None:
            parts = list(zip(encoding.rules(rule), coded[rule.name], strict=True))
        for part, tensor in parts:
            for expert in range(len(tensor)) if part.stacked else (None,):
                own = tensor if expert is None else tensor[expert]
                spans: list[tuple[str | None, torch.Tensor]] = [(None, own)]
                if part.parted:
                    count = len(part.segments)
                    even = own.expand(count) if own.shape == (1,) else own
                    spans = list(zip(part.segments, even.chunk(count), strict=True))
                for segment, value in spans:
                    value = value.reshape(()) if scalars and value.shape == (1,) else value
                    content[part.disk_name(expert, segment)] = value.contiguous().clone()
    return content


def encodings_of(model: PreTrainedModel, recipe: Any, **renamed: str) -> dict[str, Encoding]:
    """What a recipe encodes, with encodings exchanged for others by name."""
    found = resolve_recipe(recipe, get_architecture(model.config.model_type), model.config)
    return {
        name: ENCODINGS[renamed.get(encoding.name.replace("-", "_"), encoding.name)]
        for name, encoding in found.items()
    }


def write_family(folder: Path, name: str, recipe: Any = "nvfp4") -> tuple[PreTrainedModel, ElasticConfig]:
    """A quantised family in the stock layout."""
    model, elastic = family(name)
    encodings = encodings_of(model, recipe)
    elastic = elastic.quantized(encodings, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(model, encodings), folder / "model.safetensors", metadata={"format": "pt"})
    elastic.save_pretrained(folder)
    return model, elastic


def write_released(
    folder: Path,
    name: str,
    encodings: Mapping[str, Encoding],
    fields: Mapping[str, Any],
    extra: Mapping[str, torch.Tensor],
    *,
    scalars: bool = False,
    renamed: bool = False,
) -> PreTrainedModel:
    """A plain checkpoint in few bits, as other programs write it: no section, but these fields in `config.json`, and more tensors."""
    model, _ = family(name)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {**tensors_of(model, encodings, scalars, renamed), **extra},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    written = {**json.loads(model.config.to_json_string()), **fields}
    (folder / "config.json").write_text(json.dumps(written))
    return model


def file_bytes(folder: Path) -> int:
    """Bytes of all tensors in the files of a folder, without headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        length = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + length])
        header.pop("__metadata__", None)
        total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
    return total
