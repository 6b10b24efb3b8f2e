"""Routers of the tests: choices for two parents, and models whose router decided."""

from __future__ import annotations

import torch
from cases import build_parent

from hf_elastic import ElasticConfig, ElasticForCausalLM, elastify
from hf_elastic.routing.router import BudgetRouter

CHOICES = {
    "nano3": {
        "hidden": [48, 40, 32, 24],
        "ffn": [40, 24, 8],
        "mamba_heads": [12, 8, 4],
        "mamba_head_dim": [8, 4],
        "attention_heads": [6, 4, 2],
        "experts": [12, 8],
        "expert_ffn": [16, 12, 8],
        "shared_expert_ffn": [24, 16, 8],
        "layers": [8, 7, 6, 5],
    },
    "granite": {
        "hidden": [48, 24],
        "mamba_heads": [24, 18, 12],
        "attention_heads": [6, 4, 2],
        "experts": [8, 6, 4],
        "expert_ffn": [16, 12, 8],
        "shared_expert_ffn": [24, 16, 8],
        "layers": [4, 3],
    },
}
RANKING = {"nano3": [2, 0, 7, 1, 5, 3, 4, 6], "granite": [1, 0, 2, 3]}
PARENTS = list(CHOICES)
PER_LAYER = {
    "nano3": ("ffn", "mamba_heads", "attention_heads", "experts", "expert_ffn", "shared_expert_ffn"),
    "granite": ("attention_heads", "mamba_heads", "experts", "expert_ffn", "shared_expert_ffn"),
}


def config_of(model, name: str) -> ElasticConfig:
    return ElasticConfig.from_parent(model.config, {}, choices=CHOICES[name], layer_ranking=RANKING[name])


def routed(name: str, per_layer=(), decide: bool = True, seed: int = 0) -> ElasticForCausalLM:
    """A model whose router decided its budgets, without having been trained."""
    model = elastify(build_parent(name), budgets={"some": {"hidden": 24}}, sort=False).eval()
    model.elastic_config = config_of(model, name)
    torch.manual_seed(seed)
    router = BudgetRouter(model.elastic_config, {"large": 0.8, "small": 0.5}, per_layer=per_layer, std=0.5)
    model.attach_router(router.freeze())
    if decide:
        section = router.decide().section(model.elastic_config.axes, router.describe())
        model.elastic_config.elastic = ElasticConfig(parent_config=model.config, elastic=section).elastic
    return model
