"""Show what every size of a checkpoint costs, before any weights are fetched.

REPO is an elastic or a plain checkpoint, or just a folder with a config.json; only the config is read. Parameters are exact. KV bytes
are per token and sequence, state bytes (convolution and SSM) per sequence, both for bfloat16 activations. Sizes without a name are those
that a router found between two budgets; limits (--budget) select them too.

  hf-elastic plan org/elastic-30b
  hf-elastic plan org/elastic-30b --budget "2.4B active"
  hf-elastic plan org/plain-30b --size hidden=1920 --size expert_ffn=960
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from .common import add_json, parse_sizes, table


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
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    hub = {"revision": args.revision} if args.revision else {}
    budgets = plan(args.repo, parse_sizes(args.size), args.budget, **hub)
    if args.json:
        print(json.dumps({"budgets": budgets}, indent=2))
    else:
        print(render(budgets))


def plan(
    repo: str, sizes: dict[str, Any] | None = None, budgets: Sequence[str] = (), **hub: Any
) -> list[dict[str, Any]]:
    """Cost and sizes of every size of a checkpoint, of what `budgets` select, and of `sizes` under the name `custom` if there are any.

    Returns:
        `list[dict]`: `name` (`None` for sizes between budgets), `total_params`, `active_params`, `weight_bytes` per dtype,
        `kv_bytes_per_token`, `state_bytes`, `sizes`; the whole parent first. What a budget selects has its text as name.
    """
    from ..configuration_elastic import ElasticConfig, read_config
    from ..cost import CostModel
    from ..search import sizes_from_spec

    elastic: ElasticConfig = read_config(repo, plain=True, **hub)
    members = elastic.chain()
    members += [(budget, elastic.resolve(budget)) for budget in budgets]
    if sizes:
        ranking = elastic.axes.get("layers", {}).get("ranking")
        spec = sizes_from_spec(elastic.architecture, elastic.parent_config, sizes, ranking, multiple_of=8)
        members.append(("custom", elastic.architecture.submodel(elastic.parent_config, spec, "--size")))
    count = CostModel(elastic.parent_config)
    return [{"name": name, **count(member).to_dict(), "sizes": member.to_dict()} for name, member in members]


def render(budgets: list[dict[str, Any]]) -> str:
    """A table, with the sizes in which a budget differs from the whole parent."""
    from ..budgets import format_bytes, format_count

    whole = budgets[0]["sizes"]
    rows = [["budget", "params", "active", "bf16", "fp32", "KV/token", "state", "sizes"]]
    for entry in budgets:
        sizes = (
            entry["sizes"] if entry is budgets[0] else {k: v for k, v in entry["sizes"].items() if whole.get(k) != v}
        )
        rows.append(
            [
                entry["name"] or "-",
                format_count(entry["total_params"]),
                format_count(entry["active_params"]),
                format_bytes(entry["weight_bytes"]["bfloat16"]),
                format_bytes(entry["weight_bytes"]["float32"]),
                format_bytes(entry["kv_bytes_per_token"]),
                format_bytes(entry["state_bytes"]),
                " ".join(f"{axis}={_short(value)}" for axis, value in sizes.items()),
            ]
        )
    return table(rows, right=frozenset(range(1, 7)))


def _short(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return "[" + ",".join("-" if v is None else str(v) for v in value) + "]"
