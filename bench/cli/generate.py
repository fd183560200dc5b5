"""``llama-onnx generate``: a folder's text as it comes, with TTFT and tokens per second.

Try: ``llama-onnx generate FOLDER "Once upon a time" --temperature 0.8 --top-p 0.95 --stop "The end" --seed 7``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import deployment
from bench.cli.output import ERR, status, write_json

HELP = "stream text from an exported folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, how tokens are chosen, where it ends, and on what it runs."""
    add = parser.add_argument
    add("folder", type=Path, help="the exported folder")
    add("prompt", help="the text to continue, or '-' for standard input")
    add("--chat", action="store_true", help="apply the model's chat template to the prompt")
    how = parser.add_argument_group("how tokens are chosen")
    how.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (default) takes the likeliest token, else samples",
    )
    how.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest (default 0: all)")
    how.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest that sum to P (default 1)"
    )
    how.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 avoids earlier tokens (default 1)"
    )
    how.add_argument("--seed", type=int, metavar="N", help="repeat a sample (default: a new seed, which is printed)")
    end = parser.add_argument_group("where it ends")
    end.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at the latest (default 128)")
    end.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a text that ends it; may be repeated")
    end.add_argument("--stop-id", action="append", default=[], type=int, metavar="ID", help="a token that ends it")
    end.add_argument("--ignore-eos", action="store_true", help="continue after the model's end-of-sequence token")
    where = parser.add_argument_group("what it runs on")
    deployment.add_options(where.add_argument)
    where.add_argument("--no-cuda-graph", action="store_true", help="cuda: launch every kernel of a step by itself")


def run(args: argparse.Namespace) -> int:
    """Stream one text; timings go to standard error.

    Raises:
        SessionError: bad input; nothing was printed.
    """
    from runtime.errors import SessionError
    from runtime.generate import EOS, LENGTH, STOP_ID, STOP_STRING, stream
    from runtime.loading import read_folder
    from runtime.sampling import Sampling
    from runtime.session import NOT_AS_ASKED
    from runtime.text import TextStream, encode, load_tokenizer

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise SessionError("the prompt is not UTF-8; write it in that encoding") from None
    if not prompt:
        raise SessionError("the prompt is empty; give some text")
    how = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed).seeded()
    where = deployment.Deployment.of(args)
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

    with where.open(args.folder, huge_pages=False, cuda_graph=not args.no_cuda_graph) as session:
        eos = () if args.ignore_eos else session.manifest.eos_token_ids
        info = session.info
        for told in (info.details[k] for k in NOT_AS_ASKED if k in info.details):
            ERR.print(f"warning: {told}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        text = TextStream(tokenizer, args.stop, (*eos, *args.stop_id), ids)
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
    status(f"prompt {len(ids)} tokens, TTFT {at[0] * 1e3:.1f} ms, {len(at)} new tokens{speed}, ended by {reason}{seed}")
    if args.json:
        write_json(
            {
                "text": "".join(pieces),
                "prompt_tokens": len(ids),
                "new_tokens": len(at),
                "tokens": tokens,
                "end_reason": reason,
                "seed": how.seed,
                "ttft_s": at[0],
                "at_s": at,
                "session": info.facts,
            }
        )
    return 0
