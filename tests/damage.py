"""Damaged checkpoints by the thousand: every layout, every file, and whether what loads is what the files hold."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sound import Sound, differences
from transformers import AutoConfig

from hf_elastic import ElasticForCausalLM
from hf_elastic.commands.plan import plan
from hf_elastic.configuration_elastic import read_config
from hf_elastic.errors import HFElasticError

SECONDS = 1.0

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
        frames = traceback.extract_tb(error.__traceback__)
        ours = [
            f for f in frames if "hf_elastic" in f.filename and f.name != "from_pretrained"
        ]  # that one only passes names on
        if ours:
            raise
        read_config(folder)  # an error of ours
        raise


def try_it(sound: Sound, folder: Path, rng: random.Random) -> Result:
    """Load a damaged checkpoint in every way, and compare what loads with what its files hold."""
    result = Result()
    budget = rng.choice([None, *sound.budgets])
    how = {} if sound.described is None else {"elastic_config": copy.deepcopy(sound.described)}
    what = f"budget={budget}"
    model = _tried(result, what, lambda: ElasticForCausalLM.from_pretrained(folder, budget=budget, **how))
    if model is not None:
        try:
            result.problems += [f"{what}: {said}" for said in differences(sound, folder, budget, model)]
        except Exception:
            result.problems.append(f"{what}: loaded, but the plain reader fails: {traceback.format_exc()}")
    config = folder / "config.json"
    if config.is_file() and config.samefile(sound.folder / "config.json"):
        return result  # these read nothing else
    if sound.described is None and "export" not in sound.name:
        _tried(result, "AutoConfig", lambda: _auto_config(folder))
    _tried(result, "plan", lambda: plan(read_config(folder, plain=True)))
    return result


def kind(what: str) -> tuple[str, str]:
    """The kind of a damage and of the file that has it."""
    name, how = what.split(" ", 1)
    own = [part for part in ("router", "index", "generation") if part in name]
    if how.endswith(" swapped"):
        return "", "swapped"
    return (own or [name.rpartition(".")[2]])[0], how.partition(":")[0].split(" ")[0]


def run(
    root: Path, cases: Iterator[int] | range, sound: list[Sound], of_a_kind: int | None = None
) -> tuple[Result, list[str]]:
    """Many damaged checkpoints.

    Args:
        cases: Their seeds.
        of_a_kind: So many of every kind are tried and no more.

    Returns:
        `tuple[Result, list[str]]`: Everything together, and the problems with the seeds they had.
    """
    total, said = Result(), []
    kinds: Counter[tuple[str, str]] = Counter()
    for seed in cases:
        rng = random.Random(seed)
        chosen, folder = rng.choice(sound), root / str(seed)
        what = damage(rng, chosen, folder)
        kinds[kind(what)] += 1
        if of_a_kind is not None and kinds[kind(what)] > of_a_kind:
            shutil.rmtree(folder)
            continue
        one = try_it(chosen, folder, rng)
        total.loaded, total.refused = total.loaded + one.loaded, total.refused + one.refused
        said += [f"seed {seed}, {chosen.name}: {what}\n{problem}" for problem in one.problems]
        shutil.rmtree(folder)
    return total, said
