"""The conformance kit, over every table and every variant of its tiny model."""

from __future__ import annotations

import pytest

from hf_elastic.architectures import ARCHITECTURES
from hf_elastic.testing import check_architecture
from hf_elastic.testing.tiny import TINY

VARIANTS = [(model_type, variant) for model_type in TINY for variant in range(len(TINY[model_type]))]


@pytest.mark.parametrize(("model_type", "variant"), VARIANTS, ids=[f"{name}-{variant}" for name, variant in VARIANTS])
def test_whatever_way_a_size_is_reached_it_is_the_same_model(model_type, variant):
    check_architecture(model_type, variant=variant, each_axis=variant == 0)


def test_no_table_is_untested():
    assert set(ARCHITECTURES) == set(TINY), "give every table a tiny model in hf_elastic/testing/tiny.py"
