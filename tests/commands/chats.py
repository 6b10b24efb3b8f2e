"""What a user comes with: a stock model with a tokenizer, and files of chats. Random weights, few words."""

from __future__ import annotations

import json
import random
from pathlib import Path

from cases import granite, nemotron, randomize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
WORDS = ["<pad>", "<eos>", "<user>", "<assistant>", *NUMBERS, "what", "is", "plus", "?", "."]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content }}{{ ' <eos> ' if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{{ '<assistant> ' if add_generation_prompt else '' }}"
)


MODELS = {
    "granitemoehybrid": lambda fields: granite(**fields),
    "nemotron_h": lambda fields: nemotron("ME*E", **fields),
    "llama": lambda fields: LlamaConfig(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        **fields,
    ),
}


def save_parent(folder: Path, model_type: str = "granitemoehybrid", words: list[str] = WORDS) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    fields = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = MODELS[model_type](fields)
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.save_pretrained(folder)


def write_chats(path: Path, count: int, seed: int) -> None:
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            a, b = draw.randint(0, 4), draw.randint(0, 4)
            question = {"role": "user", "content": f"what is {NUMBERS[a]} plus {NUMBERS[b]} ?"}
            answer = {"role": "assistant", "content": f"{NUMBERS[a + b]} ."}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
