"""Writes `modelopt-*`: tiny models, quantised and exported by nvidia-modelopt itself on a CPU, and what modelopt says its weights are.

    pip install --no-deps nvidia-modelopt==0.47.0 && pip install omegaconf pulp
    python tests/quantization/files/make_modelopt.py

modelopt is too heavy to be installed for tests. `decoded.json` holds for every tensor of the file (without `.weight`, and of quantised ones
dequantised by modelopt's `QTensor` classes) the SHA-256 of its values in bfloat16, -0 as 0.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from safetensors.torch import load_file
from transformers import GraniteMoeHybridForCausalLM, NemotronHForCausalLM, PreTrainedModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from cases import granite, nemotron, randomize  # noqa: E402

WIDTHS = {"vocab_size": 16, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "dtype": "bfloat16"}
NEMOTRON = {
    "intermediate_size": 48,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_routed_experts": 6,
}
GRANITE = {
    "intermediate_size": 32,
    "shared_intermediate_size": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "num_local_experts": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "num_hidden_layers": 2,
}


def models() -> dict[str, tuple[PreTrainedModel, dict]]:
    nemotron_h = NemotronHForCausalLM(nemotron("ME*-", **WIDTHS, **NEMOTRON))
    granitemoehybrid = GraniteMoeHybridForCausalLM(granite(**WIDTHS, **GRANITE))
    return {
        "modelopt-fp8": (nemotron_h, mtq.FP8_DEFAULT_CFG),
        "modelopt-nvfp4": (copy.deepcopy(nemotron_h), mtq.NVFP4_DEFAULT_CFG),
        "modelopt-granite-nvfp4": (granitemoehybrid, mtq.NVFP4_DEFAULT_CFG),
    }


def main() -> None:
    for name, (model, settings) in models().items():
        torch.manual_seed(0)
        randomize(model.eval())
        model = model.to(torch.bfloat16)
        model.config.dtype, model.config.architectures = torch.bfloat16, [type(model).__name__]
        ids = torch.randint(0, WIDTHS["vocab_size"], (2, 12))
        quantised = mtq.quantize(model, settings, lambda model, ids=ids: model(ids))
        folder = HERE / name
        export_hf_checkpoint(quantised, export_dir=folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        said = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in decoded(folder)}
        (folder / "decoded.json").write_text(json.dumps(said, indent=0) + "\n")


def decoded(folder: Path):
    """What every tensor of the file is, in bfloat16, as 16-bit numbers."""
    file = load_file(folder / "model.safetensors")
    for name, tensor in sorted(file.items()):
        module = name.removesuffix(".weight")
        scale, last = file.get(f"{module}.weight_scale"), file.get(f"{module}.weight_scale_2")
        if name.endswith(("_scale", "_scale_2")):
            continue
        if tensor.dtype == torch.uint8:
            shape = torch.Size((tensor.shape[0], tensor.shape[1] * 2))
            whole = NVFP4QTensor(shape, torch.bfloat16, tensor)
            tensor = whole.dequantize(scale=scale, double_scale=last, block_sizes={-1: 16})
        elif scale is not None:
            tensor = FP8QTensor(tensor.shape, torch.float32, tensor).dequantize(scale=scale)
        yield module, (tensor.bfloat16() + 0).contiguous().view(torch.int16)  # its -0 is 0


if __name__ == "__main__":
    main()
