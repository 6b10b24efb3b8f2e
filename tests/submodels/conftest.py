"""Families of one test's own, and slices that no test changes."""

import pytest
from transformers import AutoModelForCausalLM

load = AutoModelForCausalLM.from_pretrained


@pytest.fixture
def family(family_folder):
    """Everything that is loaded, for one test."""
    return lambda name, **kwargs: load(family_folder(name), **kwargs)


@pytest.fixture(scope="module")
def sliced(family_folder):
    """Slices that no test changes."""
    models = {}

    def get(name, budget):
        if (name, budget) not in models:
            models[name, budget] = load(family_folder(name), budget=budget)
        return models[name, budget]

    return get
