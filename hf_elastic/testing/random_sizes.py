"""Random sizes in random layers, for runs that look at many of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from ..architectures import Architecture
from ..architectures.submodel import LAYERS
from ..errors import ElasticConfigError, HFElasticError
from ..submodels.slicing import slice_state_dict
from .cases import Case, largest, smaller_sizes
from .deviations import off
from .subject import Subject


def random_cases(architecture: Architecture, config: PreTrainedConfig, count: int, seed: int = 0) -> Iterator[Case]:
    """Random submodels, every axis and every layer by itself; what the stock config cannot say is drawn again."""
    draw, full = random.Random(seed), architecture.full(config)
    made = 0
    for attempt in range(200 * count):
        sizes: dict[str, Any] = {}
        uniform = draw.random() < 0.5
        for axis, whole in full.items:
            if draw.random() < 0.35:
                continue
            choices = [largest(whole), *smaller_sizes(architecture, config, full, axis)]
            if isinstance(whole, int) or uniform:
                sizes[axis] = draw.choice(choices)
            else:
                sizes[axis] = [None if size is None else min(size, draw.choice(choices)) for size in whole]
        if draw.random() < 0.4:
            sizes[LAYERS] = sorted(draw.sample(range(full.depth), draw.randint(1, full.depth)))
            sizes = _without_dropped(sizes, full.depth)
        try:
            submodel = architecture.submodel(config, sizes)
        except ElasticConfigError:
            continue
        yield Case(f"random {attempt}", sizes, submodel)
        made += 1
        if made == count:
            return
    raise HFElasticError(f"only {made} of {count} random submodels of {architecture.model_type} can be said.")


def deviation_of(subject: Subject, case: Case) -> float:
    """How far the masked parent, a stock model with the slice of its weights, and the live budget are from each other."""
    architecture, config = subject.architecture, subject.parent.config
    stock = architecture.config_for(config, case.submodel)
    stock._experts_implementation = "eager"  # the default needs rows of 16 bytes
    with no_init_weights():
        sliced = (type(subject.live) if stock.is_heterogeneous else architecture.causal_class)(stock).eval()
    sliced.load_state_dict(slice_state_dict(architecture, config, subject.parent.state_dict(), case.submodel))
    logits = subject.logits(sliced)
    with subject.live.at(case.submodel) as view:
        live = subject.logits(view)
    return max(off(logits, subject.logits(subject.masked(case))), off(live, logits))


def _without_dropped(sizes: dict[str, Any], depth: int) -> dict[str, Any]:
    kept = sizes[LAYERS]
    return {
        axis: [size if i in kept else None for i, size in enumerate(value)]
        if axis != LAYERS and isinstance(value, list)
        else value
        for axis, value in sizes.items()
    }
