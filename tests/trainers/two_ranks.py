"""The runs that test_distributed compares: in one process, or on every rank, in the environment that torchrun gives it."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (0, 1)]
torch.set_num_threads(1)

from adapted import adapted  # noqa: E402
from quantized import BUDGETS, quantizable_parent  # noqa: E402
from runs import Recorder, family, rows, trainer  # noqa: E402

from hf_elastic import ElasticConfig, ElasticForCausalLM, elastify  # noqa: E402
from hf_elastic.quantization.recipes import resolve_recipe  # noqa: E402
from hf_elastic.submodels import rounding  # noqa: E402

# A large epsilon, because m / (sqrt(v) + eps) turns float noise in a gradient near zero into a whole step if eps is small.
ADAM = {"adam_epsilon": 1e-3, "weight_decay": 0.1}
TRAINED = {
    "checkpointed": {"gradient_accumulation_steps": 2, "seed": 13},
    "plain": {"gradient_accumulation_steps": 2, "seed": 13, "gradient_checkpointing": False},
    "hidden": {"gradient_accumulation_steps": 2, "seed": 13, "hidden_loss_weight": 2.0},
    "handover": {
        "gradient_accumulation_steps": 2,
        "seed": 13,
        "activation_checkpointing": False,
        "handover_probability": 0.7,
        "handover_token": "A",
    },
    "only_small": {"budget_probabilities": {"small": 1.0}},
    "lora": {"gradient_accumulation_steps": 2, "seed": 13},
    # One step: after it, weights that differ in their last bit could be rounded to different codes.
    "quantized": {"gradient_accumulation_steps": 4, "seed": 13, "quantization": "nvfp4", "max_steps": 1},
}
"""Runs of the trainer by name."""
SHARDED = {
    "accumulated": (["small"], ["full", "small"], ["medium", "full", "small"]),
    "checkpointed": (["small"], ["full", "medium"], ["small", "small"]),
    "hidden": (["small"], ["full", "medium"], ["small", "small"]),
    "lora": (["small"], ["full", "small"], ["medium", "full", "small"]),
    "handover": (["full>small"], ["full>large", "small"], ["small>medium", "full", "large>full"]),
    "quantized": (["mid", "full", "small"],),
}
"""Budgets per step and micro-batch of the runs on `fully_shard`."""


def student(name: str) -> Any:
    """What a run trains: all weights, or adapters that are not zero, with the parent without them as teacher."""
    if name == "quantized":
        return quantizable().train()
    return adapted("nano3") if name == "lora" else family().train()


def quantizable() -> ElasticForCausalLM:
    """A family whose sizes are on the blocks of NVFP4."""
    torch.manual_seed(0)
    return elastify(quantizable_parent("nemotron", torch.float32), budgets=BUDGETS["nemotron"], sort=False)


def train(name: str, folder: Path, ranks: int) -> dict[str, Any]:
    """Four rows per micro-batch, however many ranks share them."""
    made = trainer(
        folder / f"{name}{os.environ.get('RANK', '')}",
        student(name),
        dataset=rows(24),
        eval_dataset=rows(8, 1),
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=4 // ranks,
        ddp_backend="gloo" if ranks > 1 else None,
        **ADAM,
        **{"max_steps": 3, **TRAINED[name]},
    )
    recorder = Recorder().watch(made)
    made.train()
    metrics = made.evaluate()
    model = made.accelerator.unwrap_model(made.model)
    return {
        "state": {key: p.detach().clone() for key, p in model.named_parameters()},
        "logs": [
            {key: value for key, value in entry.items() if key in ("loss", "num_tokens", "grad_norm") or "/" in key}
            for entry in made.state.log_history
            if "loss" in entry
        ],
        "eval": {key: value for key, value in metrics.items() if "/" in key},
        "budgets": [[budget for budget, _ in step] for step in recorder.steps],
        "rows": [[len(batch["input_ids"]) for _, batch in step] for step in recorder.steps],
        "distributed": str(made.accelerator.distributed_type),
        "wrapper": type(made.model_wrapped).__name__,
    }


def route(folder: Path, ranks: int) -> dict[str, Any]:
    """Two steps at the mixtures of a router, then one at what it decided."""
    model = family()
    choices = {"hidden": [48, 40, 32, 24], "expert_ffn": [16, 12, 8, 4], "layers": [8, 7, 6]}
    model.elastic_config = ElasticConfig.from_parent(
        model.config, {}, choices=choices, layer_ranking=[2, 0, 7, 1, 5, 3, 4, 6]
    )
    made = trainer(
        folder / f"router{os.environ.get('RANK', '')}",
        model,
        dataset=rows(24),
        router_targets={"large": 0.75, "small": 0.5},
        router_steps=2,
        router_learning_rate=0.05,
        max_steps=3,
        gradient_accumulation_steps=2,
        seed=13,
        per_device_train_batch_size=4 // ranks,
        ddp_backend="gloo" if ranks > 1 else None,
        **ADAM,
    )
    made.train()
    model = made.accelerator.unwrap_model(made.model)
    return {
        "router": {key: tensor.clone() for key, tensor in model.router.state_dict().items()},
        "state": {key: p.detach().clone() for key, p in model.named_parameters()},
        "sizes": {key: entry["sizes"] for key, entry in model.budgets.items()},
        "report": made.routing.report,
    }


def shard(name: str, rank: int, ranks: int) -> dict[str, Any]:
    """The trainer's loss on `fully_shard`, which accelerate does not apply on a CPU: every rank has its share of six rows."""
    from hf_elastic.trainers.forward import (
        forward_as,
        head_now,
        head_of,
        last_hidden,
        last_hidden_through,
        states_after,
    )
    from hf_elastic.trainers.handover import beginning, go_on, split_rows
    from hf_elastic.trainers.lora import as_teacher, base_of, whole_head_of
    from hf_elastic.trainers.losses import chunked_divergence, summed_hidden_distance
    from hf_elastic.trainers.teacher import shard_teacher

    model, teacher = student(name), None if name == "lora" else quantizable() if name == "quantized" else family()
    base, before = base_of(model), nullcontext if teacher else lambda: as_teacher(base)
    if name not in ("accumulated", "handover"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kinds = set()
    if ranks > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = init_device_mesh("cpu", (ranks,))
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if teacher:
            teacher = shard_teacher(teacher, mesh=mesh)
            assert isinstance(teacher.model.layers[0], FSDPModule)
        kinds = {type(p).__name__ for p in model.parameters()}
    teaching = base_of(teacher or model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=ADAM["adam_epsilon"]
    )
    ids = torch.randint(2, 64, (6, 14), generator=torch.Generator().manual_seed(3))
    everywhere = torch.ones(len(ids[rank::ranks]), ids.shape[1] - 1, dtype=torch.bool)
    losses, codes = [], []
    if name == "quantized":
        base.round_weights(resolve_recipe("nvfp4", base.architecture, base.elastic_config.parent_config))

        def recorded(
            weight: torch.Tensor, *args: Any, original: Any = rounding.rounded, **kwargs: Any
        ) -> torch.Tensor:
            codes.append(original(weight, *args, **kwargs))
            return codes[-1]

        rounding.rounded = recorded
    for budgets in SHARDED[name]:
        total = 0.0
        for i, given in enumerate(budgets):
            source, _, budget = given.rpartition(">")
            if ranks > 1:
                model.set_requires_gradient_sync(i == len(budgets) - 1)
            inputs = {"input_ids": ids[rank::ranks]}
            layers = base.elastic_config.submodel(budget).layers if name == "hidden" else ()
            with (
                torch.no_grad(),
                before(),
                states_after([teaching.model.layers[i] for i in layers], everywhere) as wanted,
            ):
                target = last_hidden_through(teacher or model, inputs).flatten(0, 1)

            def loss_of(
                input_ids: torch.Tensor,
                layers: Any = layers,
                target: torch.Tensor = target,
                wanted: Any = wanted,
                source: str = source,
            ) -> torch.Tensor:
                if source:  # everything after the first five tokens
                    cut = torch.full((len(input_ids),), 5)
                    behind = torch.arange(input_ids.shape[1]) >= 5
                    first, rest, *_ = split_rows({"input_ids": input_ids}, everywhere, cut)
                    wanted_of = target.unflatten(0, (len(input_ids), -1))
                    heads = []
                    with beginning(base, source) as cache:
                        given = base.submodel
                        states = last_hidden(model, {**first, "past_key_values": cache, "use_cache": True})
                        heads.append((states, wanted_of[:, ~behind], head_now(base)))
                    read = {**rest, "past_key_values": go_on(base, given, cache, first), "use_cache": True}
                    heads.append((last_hidden(model, read), wanted_of[:, behind], head_now(base)))
                    parts = [
                        chunked_divergence(
                            h.flatten(0, 1), w.flatten(0, 1), head, whole_head_of(teaching), chunk_size=10
                        )
                        for h, w, head in heads
                    ]
                    return torch.stack(parts).sum()
                with states_after([base.model.layers[i] for i in layers], everywhere) as found:
                    states = last_hidden(model, {"input_ids": input_ids}).flatten(0, 1)
                loss = chunked_divergence(states, target, head_of(base), whole_head_of(teaching), chunk_size=10)
                return loss + summed_hidden_distance(found, wanted) if wanted else loss

            with base.computing(budget), forward_as(model, loss_of):
                loss = model(**inputs) * ranks / (ids.numel() * len(budgets))
                loss.backward()
            total += float(loss.detach()) / ranks
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    state = {key: p.full_tensor() if hasattr(p, "full_tensor") else p for key, p in model.named_parameters()}
    if name == "quantized":
        rounding.rounded = rounding.rounded.__kwdefaults__["original"]
    return {
        "state": {key: p.detach().clone() for key, p in state.items()},
        "losses": losses,
        "kinds": kinds,
        "rounded": codes,
    }


def on_rank(output: Path, environment: dict[str, str]) -> None:
    """All runs of one rank, in a process of its own."""
    os.environ.update(environment)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {f"trainer {name}": train(name, output, ranks) for name in TRAINED}
    results["router"] = route(output, ranks)
    results |= {f"fully_shard {name}": shard(name, rank, ranks) for name in SHARDED}
    torch.save(results, output / f"rank{rank}.pt")
