"""Show what every size of a checkpoint costs, before any weights are fetched.

REPO is an elastic or a plain checkpoint, or just a folder with a config.json; only the config is read. Parameters are exact. KV bytes
are per token and sequence, state bytes (convolution and SSM) per sequence, both for bfloat16 activations.

  hf-elastic plan org/elastic-30b
  hf-elastic plan org/plain-30b --size hidden=1920 --size expert_ffn=960
"""

from __future__ import annotations

import argparse
import json
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
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    hub = {"revision": args.revision} if args.revision else {}
    budgets = plan(args.repo, parse_sizes(args.size), **hub)
    if args.json:
        print(json.dumps({"budgets": budgets}, indent=2))
    else:
        print(render(budgets))


def plan(repo: str, sizes: dict[str, Any] | None = None, **hub: Any) -> list[dict[str, Any]]:
    """Cost and sizes of every budget of a checkpoint, and of `sizes` under the name `custom` if there are any.

    Returns:
        `list[dict]`: `name`, `total_params`, `active_params`, `weight_bytes` per dtype, `kv_bytes_per_token`, `state_bytes`, `sizes`;
        the whole parent first.
    """
    from ..configuration_elastic import ElasticConfig, read_config
    from ..cost import CostModel
    from ..search import sizes_from_spec

    elastic: ElasticConfig = read_config(repo, plain=True, **hub)
    family = elastic.family()
    if sizes:
        ranking = elastic.axes.get("layers", {}).get("ranking")
        spec = sizes_from_spec(elastic.architecture, elastic.parent_config, sizes, ranking, multiple_of=8)
        family["custom"] = elastic.architecture.submodel(elastic.parent_config, spec, "--size")
    count = CostModel(elastic.parent_config)
    return [{"name": name, **count(member).to_dict(), "sizes": member.to_dict()} for name, member in family.items()]


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
                entry["name"],
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
