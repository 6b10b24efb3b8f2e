"""Nemotron-H in the form that lists one dict per block (`nemotron_h_puzzle`): read as a stock config with `per_layer_config`.

transformers has no such class. vLLM, SGLang, TensorRT-LLM, llama.cpp and mlx-lm read the form; what a block does not say is said for the whole
model, or else has the default of Nemotron-H.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ElasticConfigError, did_you_mean, shown

_SIZES: Mapping[str, tuple[str, ...]] = {
    "mamba": (),
    "attention": (),
    "mlp": ("intermediate_size",),
    "moe": (
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
}
"""Kinds of blocks, and what has to be known of each block; it may differ from one to the next."""

_FACTS: Mapping[str, tuple[str, ...]] = {
    "mamba": ("ssm_state_size",),
    "attention": ("sliding_window",),
    "mlp": (),
    "moe": ("moe_latent_size", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob"),
}
"""What a block may say besides; a stock model has it once."""

_PATTERN = {"mamba": "M", "attention": "*", "moe": "E", "mlp": "-"}
_KIND = {**{kind: kind for kind in _SIZES}, "linear_attention": "mamba", "full_attention": "attention"}


def stock_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stock `nemotron_h` config that say the same.

    Raises:
        `ElasticConfigError`: a block says something that is not known here, blocks differ in what a stock model has once, or fields contradict
            each other.
    """
    said = dict(fields)
    blocks = _blocks(said.pop("block_configs", None), "block_configs")
    if not blocks:
        raise ElasticConfigError(
            "block_configs is missing or empty; a nemotron_h_puzzle config lists every block in it."
        )
    mtp = _blocks(said.pop("mtp_block_configs", None) or [], "mtp_block_configs")
    said.pop("blockwise_members", None)  # what the blocks say
    kinds = [block["block_type"] for block in blocks]
    _refuse_other_kinds(said, kinds)
    result = {
        **said,
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "layers_block_type": kinds,
    }
    if mtp:
        result["mtp_layers_block_type"] = [block["block_type"] for block in mtp]
    for kind in sorted(set(kinds)):
        result.update(_once(kind, [block for block in blocks if block["block_type"] == kind], said))
    if result.get("sliding_window"):
        raise ElasticConfigError(
            f"sliding_window={shown(result['sliding_window'])}: attention of a stock nemotron_h sees everything, so this model would not be the same."
        )
    differences = _sizes(blocks, said, result)
    return {**result, "per_layer_config": differences} if differences else result


def _blocks(given: Any, where: str) -> list[dict[str, Any]]:
    """Blocks without the fields that are `None`, which means that they are said elsewhere."""
    if not isinstance(given, (list, tuple)) or not all(isinstance(block, Mapping) for block in given):
        raise ElasticConfigError(f"{where}={shown(given)} must be a list with one dict per block.")
    blocks = [{key: value for key, value in block.items() if value is not None} for block in given]
    for i, block in enumerate(blocks):
        kind = block.get("block_type")
        if not isinstance(kind, str) or kind not in _SIZES:
            raise ElasticConfigError(f"{where}[{i}]: block_type={shown(kind)} must be one of {', '.join(_SIZES)}.")
        known = ("block_type", *_SIZES[kind], *_FACTS[kind])
        for field in block.keys() - set(known):
            raise ElasticConfigError(
                f"{where}[{i}] says {field}={shown(block[field])}, which is not known of {kind} blocks ({', '.join(known)}); the model may compute "
                f"something else than is known here.{did_you_mean(field, known)}"
            )
    return blocks


def _refuse_other_kinds(said: dict[str, Any], kinds: list[str]) -> None:
    """Take out the list of kinds in its other forms, which have to say the same."""
    listed = said.pop("layers_block_type", None) or kinds
    pattern = said.pop("hybrid_override_pattern", None)
    same = isinstance(listed, (list, tuple)) and [_KIND.get(str(kind)) for kind in listed] == kinds
    if not same or pattern not in (None, "".join(_PATTERN[kind] for kind in kinds)):
        raise ElasticConfigError(
            "layers_block_type or hybrid_override_pattern do not list the kinds of block_configs; config.json was edited or damaged."
        )


def _once(kind: str, blocks: list[dict[str, Any]], said: Mapping[str, Any]) -> dict[str, Any]:
    """What blocks of a kind say that a stock model has once."""
    found = {}
    for field in _FACTS[kind]:
        values = [block.get(field, said.get(field)) for block in blocks]
        if any(value != values[0] for value in values):
            raise ElasticConfigError(
                f"block_configs: {field} is {shown(sorted(set(map(str, values))))} in {kind} blocks; a stock nemotron_h has it once."
            )
        if values[0] is not None:
            found[field] = values[0]
    return found


def _sizes(blocks: list[dict[str, Any]], said: Mapping[str, Any], result: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Set the sizes of the first block of each kind, and return those of others that differ."""
    differences: dict[int, dict[str, Any]] = {}
    first: set[str] = set()
    for i, block in enumerate(blocks):
        for field in _SIZES[block["block_type"]]:
            size = block.get(field, said.get(field))
            if type(size) is not int:
                raise ElasticConfigError(
                    f"block_configs[{i}]: {field}={shown(size)} must be a whole number, in the block or for the whole model."
                )
            if field not in first:
                first.add(field)
                result[field] = size
            elif size != result[field]:
                differences.setdefault(i, {})[field] = size
    return differences
