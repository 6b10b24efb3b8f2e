"""Several tokens on top of a cache: which stock models read them as one by one, and what is done with those that do not."""

from __future__ import annotations

import pytest
import torch
from transformers import JambaConfig

from hf_elastic import ElasticConfigError, SpeculationError, elastify
from hf_elastic.architectures import get_architecture
from hf_elastic.generation.batch import Batch, Row
from hf_elastic.testing.models import VOCAB, random_model, tiny_config
from hf_elastic.testing.tiny import TINY
from hf_elastic.trainers.checks import refuse_handover


def text(tokens: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", TINY)
def test_the_tables_know_which_models_read_on(model_type):
    """If this fails for a model that forgot, upstream has learned it, and `reads_on` can go."""
    model, ids = random_model(tiny_config(model_type)), text(13)
    whole = model(input_ids=ids, use_cache=False).logits
    cache, parts = None, []
    for start, stop in ((0, 5), (5, 9), (9, 10), (10, 13)):
        positions = torch.arange(start, stop)[None]
        out = model(input_ids=ids[:, start:stop], position_ids=positions, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    off = (torch.cat(parts, dim=1) - whole).abs().max() / whole.abs().max()
    if get_architecture(model_type).reads_on:
        assert off < 2e-5
    else:
        assert off > 0.05


def family(config: JambaConfig):
    return elastify(random_model(config), budgets={"small": {"hidden": 24}}, sort=False, progress=False)


@pytest.mark.parametrize("chunk", [None, 3])
def test_phases_go_on_from_a_cache_as_if_every_token_was_read_by_itself(chunk):
    """Also a long prompt that is to be read in chunks."""
    model, ids = family(tiny_config("jamba")), text(12)
    first = Batch(model, [Row(ids[0, :7].tolist(), 7)], None, 0, chunk)
    torch.testing.assert_close(first.logits, model(ids[:, :7]).logits[:, -1].float(), atol=2e-5, rtol=0)
    row = first.rows[0]
    row.ids = ids[0, :8].tolist()
    first.take(0)
    assert row.cached == 7
    row.ids = ids[0].tolist()  # a marker of several tokens follows
    second = Batch(model, [row], model.submodel, 0, chunk)
    torch.testing.assert_close(second.logits, model(ids).logits[:, -1].float(), atol=2e-5, rtol=0)


def test_what_needs_to_read_on_is_refused():
    model = family(tiny_config("jamba"))
    with pytest.raises(SpeculationError, match="the stock jamba forgets its cache"):
        model.generate(text(5), max_new_tokens=4, draft_budget="small")
    refuse_handover(model, trained=False)
    with pytest.raises(ElasticConfigError, match="handover_probability .* leave it at 0"):
        refuse_handover(model, trained=True)
