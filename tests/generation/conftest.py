"""Families and a tokenizer for phases: token `t17` has id 17, the first six are special or end sentences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import VOCAB
from phased import PAD
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_elastic import ElasticForCausalLM


@pytest.fixture(scope="session")
def family(family_folder) -> Callable[[str], ElasticForCausalLM]:
    """Whole families, loaded once; a test leaves them at their full size."""
    loaded: dict[str, ElasticForCausalLM] = {}

    def get(name: str) -> ElasticForCausalLM:
        if name not in loaded:
            loaded[name] = ElasticForCausalLM.from_pretrained(family_folder(name))
            loaded[name].generation_config.pad_token_id = PAD
        assert loaded[name].budget == "full"
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    symbols = ["<pad>", "<eos>", "<think>", "</think>", "\n", ".", *(f"t{i}" for i in range(6, VOCAB - 1)), "<unk>"]
    backend = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?\w+>|t\d+|[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@pytest.fixture
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 11, 7 and 4 ordinary tokens, padded on the left, and their mask."""
    ids = torch.randint(6, VOCAB, (3, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 7)):
        mask[row, :padding] = 0
        ids[row, :padding] = PAD
    return ids, mask
