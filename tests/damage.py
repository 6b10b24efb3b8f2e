"""Damaged checkpoints by the thousand: every layout, every file, and what a plain reader of JSON and safetensors says that they hold.

Every element of the sound weights is a number of its own. So where an element of a loaded model comes from can be read off the sound folder, and what it
has to be off the damaged one, without a word about how this package stores anything.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import granite, nemotron
from transformers import AutoConfig, GenerationConfig, GraniteMoeHybridForCausalLM, NemotronHForCausalLM

from hf_elastic import ElasticConfig, ElasticForCausalLM
from hf_elastic.architectures import get_architecture
from hf_elastic.commands.plan import plan
from hf_elastic.configuration_elastic import read_config
from hf_elastic.errors import HFElasticError
from hf_elastic.router import ROUTER_FILE, BudgetRouter
from hf_elastic.slicing import slice_state_dict

SECONDS = 1.0
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

        sharded = {"max_shard_size": "40KB"}
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
        except (ValueError, TypeError, LookupError, struct.error):
            continue  # of a larger budget: what is loaded has no element in it, or it is not a number here
        for key, value in held.items():
            if key in sound.stored and value.size == sound.stored[key].size:
                current[sound.stored[key].reshape(-1)] = value.reshape(-1)
    return current


# -- damages -----------------------------------------------------------------------------------------------------------

_ODD: list[Any] = [
    None, [], {}, "", 0, -1, 1, True, False, 3, 10**5, 10**8, 2**63 - 1, 10**30, -(10**12), 0.5, 1e400, float("nan"), "auto", "Infinity", "x" * 300, "float16",
    "int8", "swish", "relu3", [[]], [None], [1, 2], ["mlp"], {"a": 1}, {"0": 1}, {"__float__": "Infinity"}, "\ud800", "../x", ["a"] * 1000,
]  # fmt: skip


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: the object or list it is in, and its key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _nodes(inner)


def _damage_value(rng: random.Random, text: str) -> tuple[str, str]:
    value = json.loads(text)
    places = list(_nodes(value))
    # Lists have many entries that are alike; keys are what differs.
    places = [place for place in places if isinstance(place[0], dict)] * 4 + places
    within, key = rng.choice(places)
    before = within[key]
    how = rng.choice(
        ["odd", "odd", "odd", "near", "remove", "rename", "double", "deep", "swap", "add", "many", "whole"]
    )
    if how == "near" and isinstance(before, (int, float)) and not isinstance(before, bool):
        within[key] = rng.choice([before + 1, before - 1, before * 2, -before, str(before), float(before), [before]])
    elif how == "remove":
        del within[key]
    elif how == "rename" and isinstance(within, dict):
        within[rng.choice([f"{key}s", "unknown", key.upper(), ""])] = within.pop(key)
    elif how == "double" and isinstance(within, dict):
        other = json.dumps(rng.choice(_ODD))
        return json.dumps(value).replace(
            f"{json.dumps(key)}:", f"{json.dumps(key)}: {other}, {json.dumps(key)}:", 1
        ), f"{how} {key}"
    elif how == "deep":
        depth = rng.choice([40, 60, 300, 2000])
        within[key] = "@"
        return json.dumps(value).replace('"@"', "[" * depth + "]" * depth, 1), f"{depth} levels at {key}"
    elif how == "swap":
        other, name = rng.choice(places)
        within[key], other[name] = other[name], before
        try:
            return json.dumps(value), f"swap {key} {name}"
        except (ValueError, RecursionError):  # one of them is in the other
            return "{}", "nothing left"
    elif how == "add" and isinstance(within, dict):
        name = rng.choice(
            [
                "cut_from",
                "quantization_config",
                "per_layer_config",
                "router",
                "files",
                "num_labels",
                "rope_scaling",
                "dtype",
                "auto_map",
                "zzz",
            ]
        )
        within[name] = rng.choice(_ODD)
        return json.dumps(value), f"add {name}={within[name]!r:.40}"
    elif how == "many" and isinstance(before, list) and before:
        within[key] = before * rng.choice([2, 1000])
    elif how == "whole":
        value = rng.choice([*_ODD, value.get("elastic") if isinstance(value, dict) else None])
    else:
        within[key] = rng.choice(_ODD)
    after = (
        within[key]
        if isinstance(within, list) and key < len(within) or isinstance(within, dict) and key in within
        else "gone"
    )
    return json.dumps(value), f"{how} {key}: {before!r:.40} -> {after!r:.40}"


def _damage_header(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    keys = [key for key in header if key != "__metadata__"]
    key, other = rng.choice(keys), rng.choice(keys)
    entry, how = (
        header[key],
        rng.choice(
            ["length", "dtype", "shape", "offsets", "overlap", "names", "remove", "rename", "value", "metadata", "add"]
        ),
    )
    if how == "length":
        return struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**20, 2**40, 2**63, 2**64 - 1])) + data[
            8:
        ], how
    if how == "dtype":
        entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "U32", "I8", "F8_E4M3", "C64", "X", "", None, 3])
    elif how == "shape":
        entry["shape"] = rng.choice(
            [
                [],
                entry["shape"][::-1],
                [*entry["shape"], 1],
                [0],
                [-1],
                [2**40, 2**40],
                None,
                "x",
                [1.5],
                entry["shape"] * 2,
            ]
        )
    elif how == "offsets":
        entry["data_offsets"] = rng.choice(
            [[0, 0], [0, len(body)], entry["data_offsets"][::-1], [0, 2**62], [-4, 0], None, [0], ["a", "b"]]
        )
    elif how == "overlap":
        entry["data_offsets"] = header[other]["data_offsets"]
    elif how == "names":
        header[key], header[other] = header[other], header[key]
    elif how == "remove":
        del header[key]
    elif how == "rename":
        header[rng.choice([key + "x", key.upper(), "", "__metadata__"])] = header.pop(key)
    elif how == "value":
        header[key] = rng.choice(_ODD[:30])
    elif how == "metadata":
        header["__metadata__"] = rng.choice(_ODD[:30])
    else:
        header[rng.choice(["more", "model.rotary_emb.inv_freq", "mtp.x"])] = {
            **entry,
            "data_offsets": [len(body), len(body)],
            "shape": [0],
        }
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + body, f"{how} {key} {other}"


def _flip(rng: random.Random, data: bytes, low: int, high: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        changed[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _damage_bytes(rng: random.Random, name: str, data: bytes) -> tuple[bytes, str]:
    how = rng.choice(["truncated", "empty", "flipped", "flipped", "appended", "bom", "utf-8", "blanked", "other"])
    if how == "truncated":
        return data[: rng.randrange(len(data))], how
    if how == "empty":
        return b"", how
    if how == "flipped" and name.endswith(".safetensors"):
        (length,) = struct.unpack("<Q", data[:8])
        low, high = rng.choice([(0, 8), (8, 8 + length), (8 + length, len(data))])
        return _flip(rng, data, low, high), f"{how} in {low}..{high}"
    if how == "flipped":
        return _flip(rng, data, 0, len(data)), how
    if how == "appended":
        return data + rng.choice([b"\0", b"{}", b" ", data[:100]]), how
    if how == "bom":
        return b"\xef\xbb\xbf" + data, how
    if how == "utf-8":
        at = rng.randrange(len(data))
        return data[:at] + b"\xff\xfe" + data[at:], how
    if how == "blanked":
        start = rng.randrange(len(data))
        stop = min(len(data), start + rng.choice([1, 16, 4096]))
        return data[:start] + b"\0" * (stop - start) + data[stop:], how
    return rng.choice([b"null", b"[]", b"3", b"{", b"NaN", b"[" * 5000, b'{"a":' * 3000, b"\x80\x04N."]), how


def damage(rng: random.Random, sound: Sound, folder: Path) -> str:
    """Make a damaged copy of a checkpoint; files that are as they were are links.

    Returns:
        `str`: What was done.
    """
    for path in sound.folder.rglob("*"):
        if path.suffix in (".json", ".safetensors"):
            target = folder / path.relative_to(sound.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    name = rng.choice([*sound.files, "config.json"])
    path, how = folder / name, rng.random()
    if how < 0.08:
        path.unlink()
        if rng.random() < 0.5:
            return f"{name} missing"
        path.mkdir()
        return f"{name} a folder"
    if how < 0.14:
        other = folder / rng.choice(sound.files)
        spare = folder / "spare"
        path.rename(spare)
        if other.exists():
            other.rename(path)
        spare.rename(other)
        return f"{name} and {other.name} swapped"
    data = path.read_bytes()
    if how < 0.3:
        data, said = _damage_bytes(rng, name, data)
    elif name.endswith(".json"):
        text, said = _damage_value(rng, data.decode())
        data = text.encode("utf-8", "surrogatepass")
    else:
        data, said = _damage_header(rng, data) if how < 0.8 else _damage_bytes(rng, name, data)
    path.unlink()  # a link: the sound file stays
    path.write_bytes(data)
    return f"{name} {said}"


# -- what comes of it --------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a damaged checkpoint did: `loaded` or `refused`, or `problems`."""

    loaded: int = 0
    refused: int = 0
    problems: list[str] = field(default_factory=list)


def _tried(result: Result, what: str, call: Callable[[], Any]) -> Any:
    """The value of a call; `None` if it was refused."""
    begun = time.process_time()  # of a busy machine the time on the wall says nothing
    value = None
    try:
        value = call()
        result.loaded += 1
    except HFElasticError:
        result.refused += 1
    except Exception:
        result.problems.append(f"{what}: {traceback.format_exc()}")
    if (taken := time.process_time() - begun) > SECONDS:
        result.problems.append(f"{what} took {taken:.2f} s")
    return value


def _auto_config(folder: Path) -> Any:
    """What `AutoConfig` gives. It reads `config.json` before this package does; where it fails at that, this package has to refuse the file."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except HFElasticError:
        raise
    except Exception as error:
        if any("hf_elastic" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
            raise
        read_config(folder)  # an error of ours
        raise


def try_it(sound: Sound, folder: Path, rng: random.Random) -> Result:
    """Load a damaged checkpoint in every way, and compare what loads with what its files hold."""
    result = Result()
    budgets = rng.sample([None, *sound.budgets], 1)
    for budget in budgets:
        how = {} if sound.described is None else {"elastic_config": copy.deepcopy(sound.described)}
        model = _tried(
            result, f"budget={budget}", lambda: ElasticForCausalLM.from_pretrained(folder, budget=budget, **how)
        )  # noqa: B023
        if model is not None:
            try:
                result.problems += [f"budget={budget}: {said}" for said in _differences(sound, folder, budget, model)]
            except Exception:
                result.problems.append(
                    f"budget={budget}: loaded, but the plain reader fails: {traceback.format_exc()}"
                )
    config = folder / "config.json"
    if config.is_file() and config.samefile(sound.folder / "config.json"):
        return result  # these read nothing else
    if sound.described is None and "export" not in sound.name:
        _tried(result, "AutoConfig", lambda: _auto_config(folder))
    _tried(result, "plan", lambda: plan(read_config(folder, plain=True)))
    return result


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    ours, theirs = ours.contiguous(), theirs.to(ours.dtype).contiguous()
    return ours.shape == theirs.shape and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def _differences(sound: Sound, folder: Path, budget: str | None, model: Any) -> Iterator[str]:
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


def run(root: Path, cases: Iterator[int] | range, sound: list[Sound]) -> tuple[Result, list[str]]:
    """Many damaged checkpoints.

    Args:
        cases: Their seeds.

    Returns:
        `tuple[Result, list[str]]`: Everything together, and the problems with the seeds they had.
    """
    total, said = Result(), []
    for seed in cases:
        rng = random.Random(seed)
        chosen, folder = rng.choice(sound), root / str(seed)
        what = damage(rng, chosen, folder)
        one = try_it(chosen, folder, rng)
        total.loaded, total.refused = total.loaded + one.loaded, total.refused + one.refused
        said += [f"seed {seed}, {chosen.name}: {what}\n{problem}" for problem in one.problems]
        shutil.rmtree(folder)
    return total, said
