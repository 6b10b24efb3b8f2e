"""On a GPU everything is what it is on the CPU. CI has none, so these run where there is one."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import BUDGETS, CASES, IDS, nemotron, randomize
from compare import assert_same_logits, assert_same_weights, logits
from transformers import AutoModelForCausalLM, NemotronHForCausalLM

from hf_elastic import ElasticConfig, Phase, PhasePlan, elastify, score
from hf_elastic.checkpoints import memory
from hf_elastic.cli import main

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("exact_products"),
]
load = AutoModelForCausalLM.from_pretrained
KERNELS = [name for name in ("mamba_ssm", "causal_conv1d") if importlib.util.find_spec(name)]
without_kernels = pytest.mark.skipif(
    KERNELS, reason="compares with the CPU, where models do not run once mamba-ssm is installed"
)
ATOL = 1e-4
"""Between a GPU and the CPU, for float32 logits of magnitude 1 to 10 that are the same sums in another order. What is computed twice on the
GPU compares as on the CPU."""


def on_gpu(model) -> bool:
    return all(tensor.is_cuda for tensor in model.state_dict().values())


@without_kernels
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_slice_view_and_cpu_are_the_same(case, checkpoint, ids):
    sliced = load(checkpoint(case.parent), budget=case.submodel, device_map="cuda")
    family = load(checkpoint(case.parent), device_map="cuda")
    assert on_gpu(sliced)
    assert on_gpu(family)
    expected = load(checkpoint(case.parent), budget=case.submodel)
    assert_same_weights({name: tensor.cpu() for name, tensor in sliced.state_dict().items()}, expected)
    found = logits(sliced, ids.cuda())
    assert_same_logits(found.cpu(), logits(expected, ids), ATOL)
    with family.at(case.submodel):
        assert on_gpu(family)
        assert_same_weights(family, sliced)
        assert_same_logits(logits(family, ids.cuda()), found)


@without_kernels
@pytest.mark.parametrize("name", BUDGETS)
def test_every_layout_and_moved_families(name, family_folder, tmp_path, ids):
    """The nested layout; and a family whose sizes were active before it was moved, there and back."""
    family = load(family_folder(name))
    family.save_pretrained(tmp_path, layout="nested")
    expected = {}
    for budget in BUDGETS[name]:
        with family.at(budget):
            expected[budget] = logits(family, ids)
    assert on_gpu(family.to("cuda"))
    for budget in BUDGETS[name]:
        nested = load(tmp_path, budget=budget, device_map="cuda")
        with family.at(budget):
            assert on_gpu(family)
            assert_same_weights(family, nested)
            assert_same_logits(logits(family, ids.cuda()).cpu(), expected[budget], ATOL)
            assert_same_logits(logits(nested, ids.cuda()).cpu(), expected[budget], ATOL)
    family.to("cpu")
    for budget in BUDGETS[name]:
        with family.at(budget):
            assert_same_logits(logits(family, ids), expected[budget], 0)


@without_kernels
@pytest.mark.parametrize("name", BUDGETS)
def test_warm_switches_take_no_memory(name, family_folder, ids):
    family = load(family_folder(name), device_map="cuda")
    for budget in (*BUDGETS[name], None):
        family.set_budget(budget)
        logits(family, ids.cuda())
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for budget in (*BUDGETS[name], None) * 3:
        family.set_budget(budget)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@without_kernels
@pytest.mark.parametrize("name", BUDGETS)
def test_spread_over_gpu_memory_and_disk(name, family_folder, tmp_path, ids):
    size = sum(file.stat().st_size for file in family_folder(name).glob("*.safetensors"))
    limits = {0: size // 2, "cpu": size // 4}
    family = load(family_folder(name), device_map="auto", max_memory=limits, offload_folder=tmp_path)
    places = set(family.hf_device_map.values())
    assert 0 in places
    assert places & {"cpu", "disk"}
    for budget in (*BUDGETS[name], None):
        family.set_budget(budget)
        expected = load(family_folder(name), budget=budget) if budget else load(family_folder(name))
        assert_same_logits(logits(family, ids.cuda()).cpu(), logits(expected, ids), ATOL)


@without_kernels
@pytest.mark.parametrize("handover", ["reprefill", "cache"])
@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_phases(name, handover, family_folder):
    """The same tokens as on the CPU: random logits are further apart than devices round."""
    narrow = {"hidden": 32, "expert_ffn": 8} if name == "nano3" else {"expert_ffn": 8, "attention_heads": 4}
    phases = [Phase(budget=narrow, max_new_tokens=6), Phase(name="answer", max_new_tokens=7, handover=handover)]
    texts = []
    for device in ("cpu", "cuda"):
        family = load(family_folder(name), device_map=device)
        prompt = torch.arange(6, 17, device=device)[None]
        text = family.generate(prompt, phase_plan=PhasePlan(phases=phases), do_sample=False, pad_token_id=0)
        texts.append(text.tolist())
    assert texts[0] == texts[1]


@without_kernels
@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_speculation(name, family_folder):
    family = load(family_folder(name), device_map="cuda")
    prompt = torch.arange(6, 17, device="cuda")[None]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    alone = family.generate(prompt, **settings)
    assert torch.equal(family.generate(prompt, draft_budget="small", num_draft_tokens=3, **settings), alone)


@without_kernels
@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_sizes_in_threads(name, family_folder):
    """Sizes of their own, and blocks of one family, in threads of their own write what they write alone, and take no memory for it."""
    family = load(family_folder(name), device_map="cuda")
    budgets = (*BUDGETS[name], "full")
    prompt = torch.arange(6, 17, device="cuda")[None]
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}

    def in_block(budget: str) -> list[list[list[int]]]:
        texts = []
        for _ in range(4):
            with family.at(budget):
                texts.append(family.generate(prompt, **settings).tolist())
        return texts

    def sized(budget: str) -> list[list[list[int]]]:
        model = family.sized(budget)
        return [model.generate(prompt, **settings).tolist() for _ in range(4)]

    alone = {budget: in_block(budget)[0] for budget in budgets}
    assert len({str(text) for text in alone.values()}) == len(budgets)
    before = torch.cuda.memory_allocated()
    with ThreadPoolExecutor(2 * len(budgets)) as pool:
        runs = [(budget, pool.submit(action, budget)) for action in (in_block, sized) for budget in budgets]
        for budget, run in runs:
            assert run.result() == [alone[budget]] * 4, budget
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20  # workspaces of products, no weights
    assert family.budget == "full"


@without_kernels
def test_budget_auto_counts_the_memory_of_the_gpu(family_folder, monkeypatch):
    folder = family_folder("nano3")
    cost = ElasticConfig.from_pretrained(folder).costs()["medium"]
    needed = cost.weight_bytes(torch.float32) + cost.cache_bytes(128, 1, torch.float32)
    for free, budget in ((1e9, "full"), (needed / 0.9 + 2, "medium"), (needed / 0.9 - 2, "small")):
        monkeypatch.setattr(memory, "get_max_memory", lambda given=None, free=free: {0: int(free), "cpu": 1e12})
        assert load(folder, budget="auto", device_map="cuda").budget == budget
    monkeypatch.undo()
    free, where = memory.free_memory("cuda")
    assert where == "device 0"
    assert free == pytest.approx(torch.cuda.mem_get_info()[0], rel=0.05)


@without_kernels
@pytest.mark.parametrize("name", ["nano3", "granite"])
def test_elastify(name, parent, ids):
    """Scores are sums in another order, so ranks that are not nearly tied agree."""
    rows = [{"input_ids": row.tolist()} for row in ids]
    cpu = elastify(parent(name), rows, budgets=BUDGETS[name], progress=False, device="cpu")
    gpu = elastify(parent(name).to("cuda"), rows, budgets=BUDGETS[name], progress=False)
    assert on_gpu(gpu)
    assert_same_logits(logits(gpu, ids.cuda()).cpu(), logits(cpu, ids), ATOL)
    with cpu.at("small"), gpu.at("small"):
        assert_same_logits(logits(gpu, ids.cuda()).cpu(), logits(cpu, ids), ATOL)


@without_kernels
@pytest.mark.parametrize("name", ["nano3", "granite_tied"])
def test_scoring_uses_the_gpu_and_leaves_it(name, parent, ids):
    """A parent in main memory is scored on the GPU; nothing of it stays there, and the parent has not moved."""
    rows, model = [{"input_ids": row.tolist()} for row in ids], parent(name)
    expected = score(model, rows, progress=False, device="cpu")
    score(model, rows, progress=False)  # the first products keep a workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = score(model, rows, progress=False)
    assert torch.cuda.max_memory_allocated() > before + sum(tensor.nbytes for tensor in model.parameters())
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert not on_gpu(model)
    assert found.values.keys() == expected.values.keys()
    for axis, layers in expected.values.items():
        for layer, values in layers.items():
            assert found.values[axis][layer].device.type == "cpu"
            torch.testing.assert_close(found.values[axis][layer], values, rtol=1e-4, atol=1e-4, msg=f"{axis} {layer}")
    made = elastify(model, rows, budgets={"small": {"hidden": 32 if name == "nano3" else 24}}, progress=False)
    assert not on_gpu(made)


@without_kernels
def test_the_command_uses_the_gpu(parent, ids, tmp_path):
    parent("nano3").save_pretrained(tmp_path / "plain")
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"input_ids": {row.tolist()}}}\n' for row in ids), encoding="utf-8"
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    command = [
        "elastify",
        str(tmp_path / "plain"),
        str(tmp_path / "out"),
        "--calibration",
        str(tmp_path / "rows.jsonl"),
    ]
    assert main([*command, "--budget", "half:expert_ffn=8"]) == 0
    assert torch.cuda.max_memory_allocated() > before
    gpu = load(tmp_path / "out").state_dict()
    torch.cuda.reset_peak_memory_stats()
    assert main([*command, "--budget", "half:expert_ffn=8", "--device", "cpu"]) == 0
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()
    assert all(torch.equal(gpu[key], tensor) for key, tensor in load(tmp_path / "out").state_dict().items())


KERNEL_BUDGETS = {
    "large": {"mamba_head_dim": 16, "expert_ffn": 8},
    "small": {"hidden": 48, "mamba_heads": 8, "mamba_head_dim": 16, "expert_ffn": 8},
}
"""The convolution's kernel takes widths of `in_proj` and `conv1d` that are multiples of 8."""


@pytest.mark.skipif(not KERNELS, reason="needs mamba-ssm or causal-conv1d")
def test_kernels(tmp_path):
    """mamba-ssm's kernels against torch's operations, in a process that has no kernels: logits, texts and gradients of every size."""
    config = nemotron(
        "ME*EM-*E", hidden_size=64, mamba_num_heads=16, mamba_head_dim=32, ssm_state_size=16, chunk_size=16
    )
    model = NemotronHForCausalLM(config).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    ElasticConfig.from_parent(config, KERNEL_BUDGETS).save_pretrained(tmp_path)
    gradients = len(KERNELS) == 2  # the fused kernel for training needs both
    code = textwrap.dedent(f"""
        import sys, torch
        for name in ("mamba_ssm", "causal_conv1d"):
            sys.modules[name] = None  # as if not installed
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_gpu import measured
        torch.save(measured({str(tmp_path)!r}, "cpu", {gradients}), {str(tmp_path / "expected.pt")!r})
    """)
    subprocess.run([sys.executable, "-c", code], check=True)
    expected, found = torch.load(tmp_path / "expected.pt"), measured(str(tmp_path), "cuda", gradients)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        if tensor.dtype == torch.long:
            assert torch.equal(found[name], tensor), name
        else:  # tf32 in the kernels: ten bits of a mantissa, in sums of some dozens
            difference = (found[name] - tensor).norm() / tensor.norm()
            assert difference < 5e-3, (name, difference)


def measured(folder: str, device: str, gradients: bool) -> dict[str, torch.Tensor]:
    """Logits, a text and, if asked for, gradients of every size of a family, live and as a slice."""
    found: dict[str, torch.Tensor] = {}
    ids = torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(1)).to(device)
    family = load(folder, device_map=device)
    for budget in (*KERNEL_BUDGETS, "full"):
        family.eval()
        family.set_budget(budget)
        with torch.no_grad():
            found[f"{budget}, logits"] = logits(family, ids).cpu()
            found[f"{budget}, text"] = family.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).cpu()
            if budget != "full":
                sliced = load(folder, device_map=device, budget=budget)
                found[f"{budget}, logits of the slice"] = logits(sliced, ids).cpu()
        if not gradients:
            continue
        family.train()  # it reads weights beside their modules
        with torch.enable_grad():
            family.zero_grad()
            logits(family, ids).square().mean().backward()
        family.set_budget("full")
        grads = {name: p.grad for name, p in family.named_parameters() if p.grad is not None}
        found.update({f"{budget}, gradient of {name}": grad.cpu() for name, grad in grads.items() if grad.any()})
    return found
