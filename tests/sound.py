"""Sound checkpoints of every layout, and what a plain reader of JSON and safetensors says that one holds.

Every element of the weights is a number of its own. So where an element of a loaded model comes from can be read off the sound folder, and what it has to be
off a damaged copy, without a word about how this package stores anything.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import granite, nemotron
from transformers import GenerationConfig, GraniteMoeHybridForCausalLM, NemotronHForCausalLM

from hf_elastic import ElasticConfig, ElasticForCausalLM
from hf_elastic.architectures import get_architecture
from hf_elastic.routing.router import ROUTER_FILE, BudgetRouter
from hf_elastic.submodels.slicing import slice_state_dict

Tensors = dict[str, torch.Tensor]

_SMALL = {"vocab_size": 16, "hidden_size": 16}
_NEMOTRON = {
    "moe_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 8,
    "intermediate_size": 12,
    "n_routed_experts": 6,
}
_PARENTS: dict[str, Callable[[], Any]] = {
    "nemotron": lambda: NemotronHForCausalLM(
        nemotron("ME*-M", **_SMALL, **_NEMOTRON, mamba_num_heads=4, mamba_head_dim=4)
    ),
    "granite": lambda: GraniteMoeHybridForCausalLM(
        granite(
            **_SMALL,
            mamba_expand=2,
            mamba_n_heads=8,
            mamba_d_head=4,
            num_local_experts=4,
            shared_intermediate_size=8,
            num_attention_heads=4,
        )
    ),
}
_BUDGETS: dict[str, dict[str, Any]] = {
    "nemotron": {
        "half": {"hidden": 12, "expert_ffn": 6},
        "small": {"hidden": 8, "expert_ffn": 4, "mamba_heads": {0: 2}, "layers": [0, 1, 2, 4]},
    },
    "granite": {
        "half": {"expert_ffn": 12, "attention_heads": 2},
        "small": {"expert_ffn": 8, "attention_heads": 2, "experts": {1: 3}, "layers": [0, 1, 3]},
    },
}
_BETWEEN = {"nemotron": {"hidden": 12, "expert_ffn": 4}, "granite": {"expert_ffn": 8, "attention_heads": 2}}
_HALVES = {"nemotron": {"hidden": 8}, "granite": {"expert_ffn": 4}}  # of a plain export


@dataclass
class Sound:
    """An undamaged checkpoint.

    Args:
        folder (`Path`): Where it is; not to be changed.
        config (`PreTrainedConfig`): The stock config of all that it holds.
        live (`dict[str, torch.Tensor]`): The number of every element of the whole model.
        described (*optional*): The `elastic_config=` that it is loaded with.
    """

    name: str
    folder: Path
    config: Any
    live: Tensors
    described: Any = None
    budgets: list[str] = field(default_factory=list)
    stored: dict[str, np.ndarray] = field(default_factory=dict)
    _cut: dict[str, Tensors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in weight_files(self.folder):
            self.stored |= {key: value.astype(np.int64) for key, value in plain_tensors(file).items()}

    @property
    def files(self) -> list[str]:
        """What a damage can hit: all that loading reads."""
        names = [
            str(path.relative_to(self.folder))
            for path in sorted(self.folder.rglob("*"))
            if path.suffix in (".json", ".safetensors")
        ]
        return [name for name in names if not (name.startswith("budgets") and name.endswith(".json"))]

    def cut(self, sizes: dict[str, Any] | None) -> Tensors:
        """The numbers of a submodel's elements."""
        key = repr(sizes)
        if key not in self._cut:
            architecture = get_architecture(self.config.model_type)
            submodel = architecture.submodel(self.config, sizes or {})
            self._cut[key] = slice_state_dict(architecture, self.config, self.live, submodel)
        return self._cut[key]


@torch.no_grad()
def sound_checkpoints(root: Path) -> list[Sound]:
    """One checkpoint per layout and architecture."""
    made = []
    for kind, build in _PARENTS.items():
        model, count = build(), 1
        for tensor in model.state_dict().values():
            tensor.copy_(torch.arange(count, count + tensor.numel()).view(tensor.shape))
            count += tensor.numel()
        assert count < 2**24  # float32 holds all of them
        model.generation_config = GenerationConfig(
            max_new_tokens=7, do_sample=True, temperature=0.7, eos_token_id=[3, 4]
        )
        first = root / kind / "first"
        model.save_pretrained(first)
        config = ElasticConfig.from_parent(model.config, _BUDGETS[kind])
        section = {**config.elastic, "interpolated": [{"sizes": _BETWEEN[kind]}], "handover": {"trained": True}}
        section.pop("version")
        config = ElasticConfig(parent_config=model.config, elastic=section)
        config.save_pretrained(first)
        family = ElasticForCausalLM.from_pretrained(first)
        family.attach_router(BudgetRouter(family.elastic_config, {"half": 0.9}, width=4, std=0.5).freeze())
        live = {key: value.clone() for key, value in model.state_dict().items()}
        half = family.elastic_config.stock_config(family.elastic_config.submodel("half"))
        small = family.elastic_config.stock_config(family.elastic_config.submodel("small"))
        whole = Sound("", first, model.config, live)
        in_half, in_small = (whole.cut(family.elastic_config.budgets[name]["sizes"]) for name in ("half", "small"))
        names = ["half", "small"]

        def add(
            name: str, config: Any, live: Tensors, described: Any = None, budgets: Any = (), kind: str = kind
        ) -> None:
            made.append(Sound(f"{kind} {name}", root / kind / name, config, live, described, list(budgets)))

        sharded = {"max_shard_size": "8KB"}
        for name, kwargs in {
            "single": {}, "sharded": sharded, "nested": {"layout": "nested"}, "nested sharded": {"layout": "nested", **sharded}
        }.items():  # fmt: skip
            family.save_pretrained(root / kind / name, **kwargs)
            add(name, model.config, live, budgets=names)
        family.save_pretrained(root / kind / "slice", budget="half")
        add("slice", half, in_half, budgets=names)
        family.export(root / kind / "export", "half")
        add("export", half, in_half, {"plain": _HALVES[kind]}, ["plain"])
        family.export(root / kind / "export per layer", "small", heterogeneous=True)
        add("export per layer", small, in_small)
    return made


# -- the plain reader --------------------------------------------------------------------------------------------------

_KINDS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I32": np.int32, "U32": np.uint32}


def plain_tensors(file: Path) -> dict[str, np.ndarray]:
    """What a safetensors file holds."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        start, stop = entry["data_offsets"]
        tensors[key] = np.frombuffer(data[8 + length + start : 8 + length + stop], _KINDS[entry["dtype"]]).reshape(
            entry["shape"]
        )
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that hold weights, by their names."""
    return [file for file in sorted(folder.rglob("*.safetensors")) if file.name != ROUTER_FILE and file.is_file()]


def _current(sound: Sound, folder: Path) -> np.ndarray:
    """By the number of an element in the sound checkpoint, its value in the damaged one."""
    current = np.full(2**17, np.nan, np.float32)
    for file in weight_files(folder):
        try:
            held = plain_tensors(file)
        except (ValueError, TypeError, LookupError, RecursionError, struct.error):
            continue  # of a larger budget: what is loaded has no element in it, or it is not a number here
        for key, value in held.items():
            if key in sound.stored and value.size == sound.stored[key].size:
                current[sound.stored[key].reshape(-1)] = value.reshape(-1)
    return current


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    ours, theirs = ours.contiguous(), theirs.to(ours.dtype).contiguous()
    return ours.shape == theirs.shape and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def differences(sound: Sound, folder: Path, budget: str | None, model: Any) -> Iterator[str]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sizes: Any = None
    if budget is not None:
        sizes = sound.described[budget] if sound.described else config["elastic"]["budgets"][budget]["sizes"]
    current = _current(sound, folder)
    wanted = {key: torch.from_numpy(current[ids.numpy().astype(np.int64)]) for key, ids in sound.cut(sizes).items()}
    found = model.state_dict()
    if wanted.keys() != found.keys():
        yield f"tensors {sorted(wanted.keys() ^ found.keys())}"
        return
    yield from (f"{key} is not what the file holds" for key in wanted if not _same(found[key], wanted[key]))
    parent = config.get("parent_config", config)
    if budget is None:
        yield from _other_fields(parent, model.config)
    generation = folder / "generation_config.json"
    if generation.exists():
        yield from _other_fields(json.loads(generation.read_text(encoding="utf-8")), model.generation_config)
    section = config.get("elastic", {})
    if budget is None and section:
        theirs = {name: entry["sizes"] for name, entry in section.get("budgets", {}).items()}
        ours = {name: entry["sizes"] for name, entry in model.elastic_config.budgets.items()}
        complete = {
            name: model.elastic_config.architecture.submodel(model.config, given).to_dict()
            for name, given in theirs.items()
        }
        if ours != complete or len(model.elastic_config.interpolated) != len(section.get("interpolated", [])):
            yield f"budgets {ours} instead of {theirs}"
        if (model.router is not None) != ("router" in section):
            yield f"router {model.router}"
    if model.router is not None:
        held = plain_tensors(folder / ROUTER_FILE)
        mine = model.router.state_dict()
        if held.keys() != mine.keys() or not all(_same(mine[key], torch.from_numpy(held[key].copy())) for key in held):
            yield "the router is not what its file holds"


_NOT_KEPT = {
    "num_nextn_predict_layers",  # 0, as nothing loads these layers
    "num_hidden_layers",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "model_type",
    "_from_model_config",
}


@cache
def _defaults(kind: type) -> frozenset[str]:
    return frozenset(vars(kind()))


def _other_fields(said: dict[str, Any], config: Any) -> Iterator[str]:
    """Fields that a config has with another value than its file says."""
    known = _defaults(type(config))
    for key, value in said.items():
        if isinstance(value, (int, float, str)) and key not in _NOT_KEPT and key in known:
            mine = config.__dict__.get(key)
            if mine != value and value == value:
                yield f"{key}={mine!r}, the file says {value!r}"
