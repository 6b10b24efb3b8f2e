"""Generate text with one size of an elastic checkpoint, or let one size think and another answer.

A prompt of - is read from standard input. With a chat template the prompt is a user's message, unless --raw is given.

  hf-elastic generate family "Why is the sky blue?" --budget half
  hf-elastic generate family "Why is the sky blue?" --draft-budget half                                   # half drafts, full checks
  hf-elastic generate family "Why is the sky blue?" --thinking half --answering full --max-thinking-tokens 256   # for models that think
  hf-elastic generate family "Why is the sky blue?" --thinking half --answering half --escalate-to full --confidence 0.9    # a cascade
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from .common import (
    add_choice,
    add_device,
    add_json,
    add_markers,
    add_source,
    check_device,
    check_dtype,
    check_source,
    load_tokenizer,
    markers,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue, or - for standard input")
    parser.add_argument("--thinking", metavar="BUDGET", help="size that thinks, up to --end")
    parser.add_argument("--answering", metavar="BUDGET", help="size that answers")
    add_markers(parser)
    parser.add_argument("--max-thinking-tokens", type=int, help="cap on thinking tokens; 0 is no thinking")
    parser.add_argument("--max-answer-tokens", type=int, help="cap on the tokens of the answer")
    add_choice(parser)
    parser.add_argument(
        "--handover",
        choices=("auto", "cache", "reprefill"),
        default="auto",
        help="how the answering size takes over (default: auto)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="at most this many tokens (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1.0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")
    parser.add_argument(
        "--draft-budget", help="a smaller size that drafts for --budget: the same text, possibly sooner"
    )
    parser.add_argument("--raw", action="store_true", help="do not apply the chat template")
    add_device(parser, "compute")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    from transformers import TextStreamer, set_seed

    from ..errors import ElasticConfigError, TokenizerError, reason
    from ..generation import PhaseTextStreamer
    from ..generation.texts import check_text
    from ..modeling_elastic import ElasticForCausalLM

    if args.max_new_tokens < 1:
        raise ElasticConfigError(f"--max-new-tokens={args.max_new_tokens} must be at least 1.")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise ElasticConfigError("--temperature must be at least 0 and --top-p in (0, 1].")
    check_source(args.repo)
    plan = _plan(args)
    device = check_device(args.device)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    args.dtype = check_dtype(args.dtype)
    tokenizer = load_tokenizer(args.repo)
    model = ElasticForCausalLM.from_pretrained(
        args.repo, budget=args.budget, elastic_config=args.elastic_config, dtype=args.dtype
    ).to(device)
    check_text(tokenizer, prompt, "the prompt")
    if tokenizer.chat_template and not args.raw:
        message = [{"role": "user", "content": prompt}]
        try:
            inputs = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:  # whatever a template raises
            raise TokenizerError(
                f"the chat template of {args.repo} cannot be used: {reason(error)}; --raw does without it."
            ) from error
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].shape[1]:
        raise ElasticConfigError("the prompt is empty.")
    set_seed(args.seed)
    sampling = (
        {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
        if args.temperature
        else {"do_sample": False}
    )
    sampling |= {"max_new_tokens": args.max_new_tokens, "draft_budget": args.draft_budget}
    if plan is not None:
        sampling |= {"phase_plan": plan, "tokenizer": tokenizer, "return_dict_in_generate": True}
    streamer = None
    if not args.json:
        streamer = (
            PhaseTextStreamer(tokenizer)
            if plan
            else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        )
    start = time.perf_counter()
    output = model.generate(**inputs.to(device), streamer=streamer, **sampling)
    seconds = time.perf_counter() - start
    new = (output if plan is None else output.sequences)[0, inputs["input_ids"].shape[1] :]
    if args.json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        result = {
            "text": text,
            "tokens": len(new),
            "seconds": seconds,
            "budget": args.budget,
            "parameters": model.num_parameters(),
        }
        if plan is not None:
            result["phases"] = [record.to_dict() for record in output.phases]
        print(json.dumps(result, indent=2))


def _plan(args: argparse.Namespace) -> Any:
    """The plan of the options, if any of them asks for one."""
    from ..errors import PhasePlanError
    from ..generation import PhasePlan

    caps = {key: getattr(args, key) for key in ("max_thinking_tokens", "max_answer_tokens")}
    if args.thinking is None and args.answering is None and not any(cap is not None for cap in caps.values()):
        for option in ("handover", "start", "end", "escalate_to", "confidence", "signal"):
            if getattr(args, option) not in ("auto", None):
                raise PhasePlanError(f"--{option.replace('_', '-')} needs --thinking or --answering.")
        return None
    if args.budget is not None:
        raise PhasePlanError(
            "give either --budget, or --thinking and --answering: a loaded size has no larger one to answer."
        )
    choice = {
        key: getattr(args, key) for key in ("escalate_to", "confidence", "signal") if getattr(args, key) is not None
    }
    return PhasePlan(args.thinking, args.answering, handover=args.handover, **caps, **choice, **markers(args))
