"""``llama-onnx generate``: its options, and the text as it comes.

Try: ``llama-onnx generate FOLDER "Once upon a time" --temperature 0.8 --top-p 0.95 --stop "The end" --seed 7``.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen, where a text ends, and on what it runs."""
    how = parser.add_argument_group("how tokens are chosen")
    how.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default), else draws")
    how.add_argument("--top-k", type=int, default=0, help="draw among the K likeliest (default 0: all)")
    how.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that make up P (default 1)")
    how.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 avoids what was said (default 1)")
    how.add_argument("--seed", type=int, help="repeats a draw (default: a fresh one, which is printed)")
    end = parser.add_argument_group("where it ends")
    end.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a text that ends it; may be repeated")
    end.add_argument("--stop-id", action="append", default=[], type=int, metavar="ID", help="a token that ends it")
    end.add_argument("--ignore-eos", action="store_true", help="go on behind the model's own end token")
    where = parser.add_argument_group("what it runs on")
    where.add_argument("--provider", default="cpu", help="cpu, cuda, tensorrt or tensorrt-rtx")
    where.add_argument("--provider-option", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")
    where.add_argument("--allow-fallback", action="store_true", help="run elsewhere where the provider cannot; said")
    where.add_argument("--no-cuda-graph", action="store_true", help="launch every kernel of a decode step by itself")
    where.add_argument("--threads", type=int, help="CPU threads (default: every core)")


def run(args: argparse.Namespace, err: Console) -> int:
    """Stream one text; figures go to standard error.

    Raises:
        SessionError: bad input; nothing was printed.
    """
    from export.cache import cache_dir
    from runtime.errors import SessionError
    from runtime.generate import EOS, LENGTH, STOP_ID, STOP_STRING, stream
    from runtime.loading import load, read_folder
    from runtime.provider_options import parse_options
    from runtime.sampling import Sampling
    from runtime.text import TextStream, encode, load_tokenizer

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise SessionError("the prompt is not UTF-8; write it in that encoding") from None
    if not prompt:
        raise SessionError("the prompt is empty; give some text")
    how = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed).seeded()
    options = parse_options(args.provider_option)
    read_folder(args.folder)  # nothing of the folder is used before it is known to be what was published
    tokenizer = load_tokenizer(args.folder)
    ids = encode(tokenizer, prompt, args.chat)
    at: list[float] = []
    tokens: list[int] = []
    pieces: list[str] = []

    def say(piece: str) -> None:
        pieces.append(piece)
        if not args.json:
            print(piece, end="", flush=True)

    with load(
        args.folder,
        args.provider,
        args.threads,
        verify=False,
        huge_pages=False,
        provider_options=options,
        allow_fallback=args.allow_fallback,
        cuda_graph=not args.no_cuda_graph,
        engine_home=cache_dir(),
    ) as session:
        eos = () if args.ignore_eos else session.manifest.eos_token_ids
        info = session.info
        _tell_fallbacks(info.details, err)
        text = TextStream(tokenizer, args.stop, (*eos, *args.stop_id))
        for step in stream(session, [ids], args.max_new_tokens, (*eos, *args.stop_id), sampling=how):
            at.append(step.at_s)
            tokens.append(int(step.tokens[0]))
            say(text.push(tokens[-1]))
            if text.stopped:
                break
        say(text.finish())
    reason = EOS if tokens[-1] in eos else STOP_ID if tokens[-1] in args.stop_id else LENGTH
    reason = STOP_STRING if text.stopped else reason
    if not args.json:
        print()
    decode = (len(at) - 1) / (at[-1] - at[0]) if len(at) > 1 else None
    speed = "" if decode is None else f", decode {decode:.1f} tokens/s"
    seed = "" if how.greedy else f", seed {how.seed}"
    err.print(
        f"prompt {len(ids)} tokens, TTFT {at[0] * 1e3:.1f} ms, {len(at)} new tokens{speed}, ended by {reason}{seed}",
        style="dim",
        highlight=False,
    )
    if args.json:
        found = {
            "text": "".join(pieces),
            "prompt_tokens": len(ids),
            "new_tokens": len(at),
            "tokens": tokens,
            "end_reason": reason,
            "seed": how.seed,
            "ttft_s": at[0],
            "at_s": at,
            "session": {"runtime": info.runtime, "provider": info.provider, **info.details},
        }
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


def _tell_fallbacks(details: dict[str, Any], err: Console) -> None:
    for key in ("fallback", "partly_elsewhere"):
        if key in details:
            err.print(f"warning: {details[key]}", style="yellow", highlight=False, markup=False, soft_wrap=True)
