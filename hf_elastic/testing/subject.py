"""The model that the kit checks, in every form that it is compared in; each is made once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..architectures import get_architecture
from ..elastification.elastify import elastify
from ..modeling_elastic import ElasticForCausalLM
from ..submodels.masking import masked_model
from .blocks import Blocks, config_in_blocks
from .cases import Case, cases_of
from .models import random_model

TOKENS = (2, 13)
"""Sequences and tokens of what the models read; longer than a chunk of the scans and not a multiple of it."""


class Subject:
    """A tiny random parent with everything that is made of it.

    Args:
        config (`PreTrainedConfig`): Stock config of the parent.
        seed (`int`): Of its weights.
        folder (`Path`): Where to save.
        each_axis (`bool`, *optional*, defaults to `True`): Also every axis by itself.
        budgets (`dict[str, dict]`, *optional*): Further sizes to check.
        blocks (`Blocks`, *optional*): Only sizes that leave whole blocks of these weights.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        seed: int,
        folder: Path,
        each_axis: bool = True,
        budgets: Mapping[str, Mapping[str, Any]] | None = None,
        blocks: Blocks | None = None,
    ):
        self.architecture = get_architecture(config.model_type)
        self.parent = random_model(config, seed)
        self.folder = folder
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, config.vocab_size, TOKENS, generator=generator)
        self.cases = cases_of(self.architecture, self.parent.config, each_axis, blocks)
        self._seed, self._each_axis = seed, each_axis
        self.made: dict[str, Any] = {}  # what checks share, by name
        for name, sizes in (budgets or {}).items():
            submodel = self.architecture.submodel(self.parent.config, sizes, name)
            self.cases.said.append(Case(f"budget {name}", dict(sizes), submodel))
        self._slices: dict[str, ElasticForCausalLM] = {}

    def family(self) -> ElasticForCausalLM:
        """A new elastic model of the parent, not sorted, with the smallest cases as budgets."""
        return elastify(copy.deepcopy(self.parent), budgets=self.budgets, sort=False, progress=False)

    @property
    def budgets(self) -> dict[str, Any]:
        return {"small": self.small.sizes}

    @property
    def small(self) -> Case:
        """A size smaller in every axis, the smallest thing that the kit cuts."""
        return self.cases.named("all axes and fewer layers", "all axes", "fewer layers", "hidden")[-1]

    @cached_property
    def checkpoint(self) -> Path:
        """The family, saved."""
        self.family().save_pretrained(self.folder / "family")
        return self.folder / "family"

    @cached_property
    def live(self) -> ElasticForCausalLM:
        """The family, loaded; whoever takes a size of it goes back to the whole."""
        return ElasticForCausalLM.from_pretrained(self.checkpoint)

    @cached_property
    def in_blocks(self) -> Subject:
        """The same, in sizes that NVFP4 can hold."""
        config, folder = config_in_blocks(self.parent.config), self.folder / "in_blocks"
        folder.mkdir()
        return Subject(config, self._seed, folder, self._each_axis, blocks=Blocks(config, "nvfp4"))

    def slice(self, case: Case) -> ElasticForCausalLM:
        """A case, loaded from disk."""
        if case.name not in self._slices:
            self._slices[case.name] = AutoModelForCausalLM.from_pretrained(self.checkpoint, budget=case.submodel)
        return self._slices[case.name]

    def masked(self, case: Case) -> PreTrainedModel:
        return masked_model(self.parent, case.submodel)

    def logits(self, model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=self.ids, use_cache=False).logits
