"""Families are quantised on machines that have less memory than the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import nemotron
from safetensors import safe_open

from hf_elastic import ElasticConfig
from hf_elastic.architectures import get_architecture
from hf_elastic.architectures.pieces import pieces
from hf_elastic.checkpoints.encoding import Computed
from hf_elastic.checkpoints.names import stored_names
from hf_elastic.quantization.codec import encode
from hf_elastic.storage.streaming import size_of, write_shards

GIB = 1 << 30

CHILD = """
import re, resource, sys
from pathlib import Path

import torch
from hf_elastic import quantize_checkpoint

def now(what):  # kilobytes
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

# What counts is memory that is written to and is no file: the interpreter, torch and what they have made, and {room} bytes more. Files that are
# mapped to be read do not count, and no other limit would be without the libraries, of which gigabytes are mapped and never read.
torch.set_num_threads(1)
limit = now("VmData") + {room}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    torch.ones({model}, dtype=torch.uint8)
except RuntimeError as error:
    print("the model does not fit:", str(error).splitlines()[0])
before = now("VmRSS")
quantize_checkpoint(sys.argv[1], sys.argv[2], {recipe!r}, max_shard_size="500MB", progress=False)
print("peak", now("VmHWM") - before)
"""


def write_family(folder: Path) -> int:
    """A family of 2 GiB in bfloat16, most of it experts; gives the bytes of its weights. Every tensor is another multiple of the same random numbers."""
    config = nemotron(
        "ME*EE",
        hidden_size=1024,
        num_attention_heads=8,
        head_dim=128,
        mamba_num_heads=32,
        mamba_head_dim=64,
        ssm_state_size=64,
        n_routed_experts=128,
        moe_intermediate_size=1344,
        moe_shared_expert_intermediate_size=1024,
        vocab_size=8192,
    )
    architecture = get_architecture(config.model_type)
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    content = {}
    for piece in pieces(architecture, config, architecture.full(config)):
        rule, shape = piece.rule, piece.shape
        for expert in range(shape[0]) if rule.stacked else (None,):
            size, count = shape if expert is None else shape[1:], len(content)

            def make(size=size, seed=count) -> torch.Tensor:
                return (noise[seed % 4096 :][: torch.Size(size).numel()] * (1 + seed % 61 / 16)).view(size)

            content[stored_names(rule, architecture, expert)[0]] = Computed(size, torch.bfloat16, make, ())
    folder.mkdir()
    write_shards(folder, "model", content, "700MB")
    elastic = ElasticConfig.from_parent(config, {"half": {"experts": 64, "expert_ffn": 672}})
    elastic.dtype = torch.bfloat16
    elastic.save_pretrained(folder)
    return sum(map(size_of, content.values()))


def tensor(folder: Path, name: str) -> torch.Tensor:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - no mapping
                return file.get_tensor(name)
    raise KeyError(name)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
def test_two_gigabytes_with_one(tmp_path):
    source, out = tmp_path / "family", tmp_path / "out"
    model = write_family(source)
    assert model > 2 * GIB
    recipe = {"experts": "fp8", "*.layers.1.mixer.experts.*": "nvfp4", "mamba": "nvfp4"}
    program = CHILD.format(room=GIB, model=model, recipe=recipe)
    done = subprocess.run([sys.executable, "-c", program, source, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the model does not fit" in done.stdout
    peak = int(done.stdout.split()[-1])
    stack = 128 * 1024 * 1344 * 2
    assert peak < stack  # less than the experts of one layer, which are one tensor in the model
    for expert in (0, 127):
        for layer, format in ((1, "nvfp4"), (4, "fp8")):
            name = f"backbone.layers.{layer}.mixer.experts.{expert}.down_proj"
            parts = encode(tensor(source, f"{name}.weight"), format)
            suffixes = ("weight_packed", "weight_scale", "weight_global_scale")[: len(parts)]
            for suffix, part in zip(suffixes if format == "nvfp4" else ("weight", "weight_scale"), parts, strict=True):
                assert torch.equal(tensor(out, f"{name}.{suffix}").view(torch.uint8), part.view(torch.uint8))
    name = "backbone.layers.2.mixer.q_proj.weight"
    assert torch.equal(tensor(out, name), tensor(source, name))
