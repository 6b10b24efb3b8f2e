"""Show what every size of a checkpoint costs, before any weights are fetched.

REPO is a family (an elastic checkpoint), a plain checkpoint, or a folder with nothing but a config.json; only the config is read. The
numbers are exact counts:

  params    all parameters
  active    the parameters that one token uses; fewer than all in a mixture of experts
  bf16 ...  bytes of the weights in that type, where weights that are stored in few bits are decoded
  stored    bytes of the tensors as they are stored, of a family that is stored in few bits; packed=True holds so many
  download  bytes that loading the size fetches from the Hub, of such a family
  KV/token  bytes that attention layers keep for every token of a text, in bfloat16
  state     bytes that Mamba layers keep for a text of any length, in bfloat16
  sizes     the size of every axis (what can be cut), for sizes below the first as far as they differ from it

A row without a name is a size that a router found between two budgets; limits (--budget) select these, too.

  hf-elastic plan model
  hf-elastic plan model --size hidden=0.5                            # a size that nobody has made yet
  hf-elastic plan family --budget half                               # what a budget selects
  hf-elastic plan family --fits 24GB --context 4096 --dtype bf16     # the largest size for a GPU of 24 GB
  hf-elastic plan family-fp8 --fits 24GB --packed                    # ... with the codes of its weights in memory
  hf-elastic plan model --training lora --rank 16 --length 4096        # the memory that training takes
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ElasticConfigError
from .common import add_elastic_config, add_json, check_dtype, parse_sizes, table
from .recipes import defaults

if TYPE_CHECKING:
    from ..architectures.submodel import Submodel
    from ..checkpoints.checkpoint import Checkpoint
    from ..configuration_elastic import ElasticConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="REPO", help="Hub repository or folder")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="AXIS=SIZE",
        help="ask about a submodel that no budget names; may be given several times (a share such as 0.5 is rounded to a multiple of 8)",
    )
    parser.add_argument(
        "--budget", action="append", default=[], help="show what this budget selects; may be given several times"
    )
    parser.add_argument(
        "--fits",
        metavar="MEMORY",
        help="find the largest size whose weights and caches fit: an amount such as 24GB, or auto for nine tenths of what is free on this machine",
    )
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="with --fits: leave room for caches of so many tokens"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="with --fits: ... of so many sequences; with --training: rows that a GPU computes at a time (default: 1)",
    )
    parser.add_argument(
        "--dtype",
        help="with --fits: type of the weights and caches, with --training of the weights, such as bf16 (default: the checkpoint's; of --training "
        "full float32, as train)",
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="with --fits: weights that are stored in few bits stay so in memory (packed=True of from_pretrained) instead of being decoded",
    )
    parser.add_argument(
        "--training",
        choices=("full", "lora"),
        help="memory of a training run on every GPU: of all weights, or of LoRA adapters",
    )
    parser.add_argument("--length", type=int, metavar="TOKENS", help="with --training: of a row (default: 4096)")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="with --training: FSDP2 shards over so many (default: 1)"
    )
    parser.add_argument("--rank", type=int, metavar="N", help="with --training lora: of the adapters (default: 16)")
    add_elastic_config(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    hub = {"revision": args.revision} if args.revision else {}
    keys = {"memory": args.fits, "context_length": args.context, "batch_size": args.batch_size, "dtype": args.dtype}
    memory = {key: value for key, value in keys.items() if value is not None}
    run_keys = {"length": args.length, "gpus": args.gpus, "rank": args.rank, "rows": args.batch_size}
    _refuse_stray(args, memory)
    elastic, files = _config(args.repo, args.elastic_config, hub)
    budgets = plan(elastic, parse_sizes(args.size), args.budget, files)
    found = fits(elastic, memory, args.packed) if args.fits is not None else {}
    trained: dict[str, Any] = {}
    if args.training:
        given = {key: value for key, value in run_keys.items() if value is not None}
        trained = training(elastic, args.training, args.dtype, **given)
    if args.json:
        answers = {"fits": found, "training": trained}
        print(json.dumps({"budgets": budgets, **{key: answer for key, answer in answers.items() if answer}}, indent=2))
    else:
        print(render(budgets))
        if found:
            print(f"\n{tell(found)}")
        if trained:
            print(f"\n{tell_training(trained)}")


def _refuse_stray(args: argparse.Namespace, memory: dict[str, Any]) -> None:
    """Refuse options that nothing would look at."""
    if memory and args.fits is None and not args.training:
        raise ElasticConfigError("--context, --batch-size and --dtype say how much a size needs; give --fits too.")
    if args.packed and args.fits is None:
        raise ElasticConfigError("--packed says how weights are held in memory; give --fits too.")
    if args.context is not None and args.fits is None:
        raise ElasticConfigError(
            "--context is the length of caches: give --fits too. Rows of a training run have a --length."
        )
    stray = [f"--{name}" for name in ("length", "gpus", "rank") if getattr(args, name) is not None]
    if stray and not args.training:
        raise ElasticConfigError(f"{' and '.join(stray)} describe a training run; give --training full or lora too.")
    if args.rank is not None and args.training == "full":
        raise ElasticConfigError("--rank is of adapters, which --training full has none of; give --training lora.")


def _config(repo: str, described: str | None, hub: dict[str, Any]) -> tuple[ElasticConfig, Checkpoint | None]:
    """The config, and the files of a checkpoint in few bits whose config does not say which weights are, of which headers are read."""
    from ..checkpoints.described import described_config
    from ..checkpoints.released import released
    from ..configuration_elastic import read_config
    from ..storage.sources import pinned

    elastic = read_config(repo, plain=True, **hub) if described is None else described_config(repo, described, **hub)
    elastic, files = released(repo, elastic, plain=not elastic.axes or described is not None, **pinned(repo, hub))
    if files is not None:
        files.check(elastic.architecture, elastic.parent_config, ignored=elastic.architecture.ignored())
    return elastic, files


def plan(
    repo: str | ElasticConfig,
    sizes: dict[str, Any] | None = None,
    budgets: Sequence[str] = (),
    files: Checkpoint | None = None,
) -> list[dict[str, Any]]:
    """Cost and sizes of every size of a checkpoint, of what `budgets` select, and of `sizes` under the name `custom` if there are any.

    With `files`, whose headers are read, bytes that are stored and fetched are counted from these.

    Returns:
        `list[dict]`: `name` (`None` for sizes between budgets), `total_params`, `active_params`, `weight_bytes` per dtype (decoded),
        `kv_bytes_per_token`, `window_bytes`, `state_bytes`, `stored_bytes` (of tensors as they are in the files), `download_bytes`, `formats` (in few bits), `sizes`, and
        `obstacles`: the `program`s that do not run an export of it, what each `does` and `why`; the whole parent first. What a budget selects has its
        text as name.
    """
    from ..architectures.portability import portability
    from ..checkpoints.downloads import download_bytes, stored_bytes
    from ..elastification.search import sizes_from_spec
    from ..quantization.layouts import coded_in

    if isinstance(repo, str):
        elastic, files = _config(repo, None, {})
    else:
        elastic = repo
    members = elastic.chain()
    members += [(budget, elastic.resolve(budget)) for budget in budgets]
    if sizes:
        ranking = elastic.axes.get("layers", {}).get("ranking")
        spec = sizes_from_spec(elastic.architecture, elastic.parent_config, sizes, ranking, multiple_of=8)
        submodel = elastic.architecture.submodel(elastic.parent_config, spec, "--size")
        members.append(("custom", elastic.resolve(submodel)))
    count = elastic.cost_model()
    formats = list(dict.fromkeys(encoding.format for encoding in elastic.encodings.values()))
    table, coded = elastic.architecture, coded_in(elastic.encodings)

    def obstacles(member: Submodel) -> list[dict[str, str]]:
        return [o._asdict() for o in portability(table, elastic.parent_config, member, elastic.load_dtype, coded)]

    def bytes_of(member: Submodel) -> dict[str, Any]:
        stored, fetched = stored_bytes(elastic, member, files), download_bytes(elastic, member, files)
        return {"stored_bytes": stored, "download_bytes": fetched, "formats": formats}

    return [
        {
            "name": name,
            **count(member).to_dict(),
            **bytes_of(member),
            "sizes": member.to_dict(),
            "obstacles": obstacles(member),
        }
        for name, member in members
    ]


def fits(elastic: ElasticConfig, memory: dict[str, Any], packed: bool = False) -> dict[str, Any]:
    """What a checkpoint has for an amount of memory, by what `budget=` would select.

    Args:
        memory (`dict[str, Any]`): A memory budget, see [`hf_elastic.configuration.budgets`]; `"auto"` is what is free.
        packed (`bool`, *optional*, defaults to `False`): Weights that are stored in few bits stay so in memory.

    Returns:
        `dict`: `limit` in words, `bytes`, `dtype`, `packed`; `needs`: bytes per name of a size, largest first; `budget`: the largest named size that fits,
        `None` if none does; `between`: whether a size between two budgets is larger and fits, and then its `total_params` and `needs`.
    """
    from ..checkpoints.memory import asks_for_free_memory, with_free_memory
    from ..configuration.budgets import parse_limit
    from ..errors import UnknownBudgetError

    if asks_for_free_memory(memory, elastic):
        memory, _ = with_free_memory(memory, elastic)
    limit: Any = parse_limit(memory)
    count, dtype = elastic.cost_model(), elastic.load_dtype
    if packed and not elastic.encodings:
        raise ElasticConfigError(
            "--packed: no weights of this checkpoint are stored in few bits; leave it out, or quantise the family first."
        )
    needs = {name: limit.measure(count(member), dtype, packed) for name, member in elastic.family().items()}
    fitting = [name for name, size in needs.items() if size <= limit.value]
    found = {
        "limit": str(limit),
        "bytes": limit.value,
        "dtype": str(limit.dtype or dtype).removeprefix("torch."),
        "packed": packed,
        "needs": needs,
    }
    found |= {"budget": max(fitting, key=lambda name: needs[name], default=None), "between": None}
    try:
        chosen = elastic.resolve(memory, packed=packed)
    except UnknownBudgetError:
        return found
    if elastic.name_of(chosen) is None:
        cost = count(chosen)
        found["between"] = {"total_params": cost.total_params, "needs": limit.measure(cost, dtype, packed)}
    return found


def tell(found: dict[str, Any]) -> str:
    """The answer of `fits` in a sentence or two."""
    from ..configuration.budgets import format_bytes, format_count

    name, needs, between = found["budget"], found["needs"], found["between"]
    room = f"{found['limit']}, packed" if found["packed"] else f"{found['limit']} in {found['dtype']}"
    lines = [f"largest in {room}: {name}, which needs {format_bytes(needs[name])}"] if name is not None else []
    if between:
        size = f"a size between two budgets, {format_count(between['total_params'])}, needs {format_bytes(between['needs'])} and fits"
        lines.append(
            f"{size}, too; a limit selects it, a name does not" if lines else f"{room}: no budget fits, but {size}"
        )
    if not lines:
        least = min(needs, key=lambda name: needs[name])
        lines.append(f"nothing fits into {room}: the smallest, {least}, needs {format_bytes(needs[least])}")
    return "\n".join(lines)


def training(elastic: ElasticConfig, kind: str, dtype: str | None = None, **options: int) -> dict[str, Any]:
    """What a training run of a family takes, see [`hf_elastic.submodels.training_memory.training_memory`].

    Without `dtype` the weights are what `hf-elastic train` makes them.

    Returns:
        `dict`: `kind`, `dtype`, `gpus`, `parts` (`part`, `bytes` per GPU, whether `counted`, `how`), `bytes` of all of them per GPU, and
        `flops_per_token` if every size is drawn as often as the others.
    """
    import torch

    from ..architectures.cost import CostModel
    from ..submodels.training_memory import training_flops, training_memory

    dtype = defaults({"use_peft": kind == "lora"})["dtype"] if dtype is None else check_dtype(dtype)
    weights = elastic.load_dtype if dtype == "auto" else getattr(torch, dtype)
    parts = training_memory(elastic.parent_config, kind, dtype=weights, **options)  # type: ignore[arg-type]
    count = CostModel(elastic.parent_config)
    active = [count(member).active_params for member in elastic.family().values()]
    return {
        "kind": kind,
        "dtype": str(weights).removeprefix("torch."),
        "gpus": options.get("gpus", 1),
        "parts": [part.to_dict() for part in parts],
        "bytes": sum(part.size for part in parts),
        "flops_per_token": training_flops(elastic.parent_config, kind, active),  # type: ignore[arg-type]
    }


def tell_training(run: dict[str, Any]) -> str:
    """The answer of `training` as a table."""
    from ..configuration.budgets import format_bytes

    rows = [["training", "per GPU", "", "how"]]
    rows += [
        [part["part"], format_bytes(part["bytes"]), "counted" if part["counted"] else "estimated", part["how"]]
        for part in run["parts"]
    ]
    rows.append(["together", format_bytes(run["bytes"]), "", "leave a sixth of the GPU free besides"])
    flops = f"{run['flops_per_token']:.2g} operations per token, if all sizes of the checkpoint are drawn alike"
    return f"{table(rows, right=frozenset({1}))}\n{flops}"


def render(budgets: list[dict[str, Any]]) -> str:
    """A table, with the sizes in which a budget differs from the whole parent, and which programs do not run which of them."""
    from ..configuration.budgets import format_bytes, format_count

    whole = budgets[0]["sizes"]
    slides = any(entry["window_bytes"] for entry in budgets)
    coded = bool(whole_formats := budgets[0]["formats"])
    head = ["budget", "params", "active", *["stored", "download"][: 2 * coded], "bf16", "fp32"]
    head += ["KV/token", *["KV window"][:slides], "state", "sizes"]
    rows = [head]
    for entry in budgets:
        sizes = (
            entry["sizes"] if entry is budgets[0] else {k: v for k, v in entry["sizes"].items() if whole.get(k) != v}
        )
        rows.append(
            [
                entry["name"] or "-",
                format_count(entry["total_params"]),
                format_count(entry["active_params"]),
                *[format_bytes(entry[key]) for key in ("stored_bytes", "download_bytes") if coded],
                format_bytes(entry["weight_bytes"]["bfloat16"]),
                format_bytes(entry["weight_bytes"]["float32"]),
                format_bytes(entry["kv_bytes_per_token"]),
                *[format_bytes(entry["window_bytes"])][:slides],
                format_bytes(entry["state_bytes"]),
                " ".join(f"{axis}={_short(value)}" for axis, value in sizes.items()),
            ]
        )
    notes = obstacle_notes(budgets)
    if coded:
        told = f"stored in {' and '.join(whole_formats)}; loaded, weights are decoded and take what the columns bf16 and fp32 say. packed=True"
        notes.insert(0, f"{told} holds what is stored.")
    return "\n".join([table(rows, right=frozenset(range(1, len(head) - 1))), *([""] if notes else []), *notes])


def obstacle_notes(budgets: list[dict[str, Any]]) -> list[str]:
    """A line for every set of obstacles, with the names of the sizes that have it."""
    from ..architectures.obstacles import Obstacle
    from ..architectures.portability import words

    told: dict[str, list[str]] = {}
    for entry in budgets:
        if entry["obstacles"]:
            told.setdefault(words([Obstacle(**o) for o in entry["obstacles"]]), []).append(entry["name"] or "-")
    return [f"exported, {', '.join(names)}: {text}" for text, names in told.items()]


def _short(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return "[" + ",".join("-" if v is None else str(v) for v in value) + "]"
