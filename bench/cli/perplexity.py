"""``llama-onnx perplexity``: word perplexity of a folder, beside its baseline where one is named.

Each window's result is kept by content (:mod:`bench.gate.store`): a run that was killed goes on, a baseline is scored
once for all its folders. ``--workers`` shares the windows (:mod:`bench.process.workers`).
Try: ``llama-onnx perplexity FOLDER --dataset hf:wikitext --baseline demo``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import deployment
from bench.cli.numbers import at_least
from bench.cli.output import show, status
from bench.progress import progress
from export.source import add_option

if TYPE_CHECKING:
    from bench.gate.word_perplexity import Window, WordPerplexity
    from bench.runtimes.remote import RemoteSession
    from runtime.ort_session import OrtSession
    from runtime.session import Session

HELP = "word perplexity of an exported folder, as lm-evaluation-harness computes it (WikiText-2)"
Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, the text, and who computes."""
    add = parser.add_argument
    add("folder", type=Path, help="the exported folder")
    add("--dataset", help="hf:wikitext, hf:/path/to/copy:wikitext, or a JSONL file (default: the project's own data)")
    add(
        "--baseline",
        metavar="MODEL",
        help="also that of this model on PyTorch: 'demo', a checkpoint folder, a .gguf file or a hub id",
    )
    add_option(add)
    add("--window", type=at_least(1), metavar="N", help="tokens scored at once (default: the context, at most 2048)")
    add("--limit", type=at_least(1), metavar="N", help="only the first N documents")
    deployment.add_options(add)
    add(
        "--workers",
        type=at_least(1),
        default=1,
        metavar="N",
        help="processes that share the work, through Ray (default 1)",
    )


def scored(
    opener: Callable[[], Session],
    windows: Sequence[Window],
    key: Sequence[Any],
    workers: int,
    say: Say,
    tick: Callable[[], None],
    gpus: float = 0,
) -> list[float]:
    """Nats of every window; those that an earlier run finished are taken from the disk.

    ``key`` holds what decides them besides the windows: the digests of the files, the deployment.
    """
    from bench.gate.store import ResultStore, key_of
    from bench.gate.word_perplexity import window_nats
    from bench.process.workers import run_units
    from export.cache import cache_dir

    store = ResultStore(key_of(list(key)), cache_dir() / "perplexity", say=say, title="perplexity cache")
    requests = [["nats", w.inputs, w.targets] for w in windows]
    nats: list[Any] = [store.value(request) for request in requests]
    todo = [k for k, known in enumerate(nats) if known is None]
    if len(todo) < len(windows):
        say(f"{len(windows) - len(todo)} of {len(windows)} windows were scored before")
    for _ in range(len(windows) - len(todo)):
        tick()

    def done(place: int, found: float) -> None:
        nats[todo[place]] = found
        store.keep_value(requests[todo[place]], found)
        tick()

    run_units(
        opener, window_nats, [windows[k] for k in todo], workers=workers, gpus_per_worker=gpus, say=say, done=done
    )
    return nats


def metrics(found: WordPerplexity) -> dict[str, Any]:
    """The metrics as JSON."""
    return {
        "word_perplexity": found.word_perplexity,
        "byte_perplexity": found.byte_perplexity,
        "bits_per_byte": found.bits_per_byte,
        "documents": len(found.nats),
        "words": sum(found.words),
        "bytes": sum(found.bytes),
        "tokens": found.tokens,
        "settings": found.settings,
    }


def run(args: argparse.Namespace) -> int:
    """Score the folder, and the baseline if one is named."""
    from bench.data.loading import load_dataset
    from bench.gate.word_perplexity import assemble, document_windows
    from bench.machine.environment import versions
    from export.manifest import sha256_of
    from export.source import resolve
    from runtime.loading import read_folder
    from runtime.text import load_tokenizer

    folder = args.folder.expanduser()
    manifest = read_folder(folder)
    dataset = load_dataset(args.dataset)
    items = tuple(i for i in dataset.items if i.task == "perplexity")
    name = f"{dataset.name}, first {args.limit}" if args.limit else dataset.name
    dataset = replace(dataset, items=items[: args.limit], name=name)
    windows = document_windows(dataset, load_tokenizer(folder), manifest.longest_row, args.window)
    where = deployment.Deployment.of(args)
    gpus = 0 if where.device == "cpu" else 1
    # A third-party export's manifest has no hashes.
    files = sorted((name, entry.sha256 or sha256_of(folder / name)) for name, entry in manifest.files.items())
    scores: dict[str, WordPerplexity] = {}
    found: dict[str, Any] = {"dataset": dataset.name, "dataset_sha256": dataset.sha256, "workers": args.workers}

    def score(side: str, opener: Callable[[], Session], *key: Any) -> None:
        with progress(side, len(windows)) as bar:
            nats = scored(opener, windows, [side, *key], args.workers, status, bar.tick, gpus)
        scores[side] = assemble(dataset, windows, nats)
        found[side] = metrics(scores[side])

    opened: list[OrtSession | RemoteSession] = []

    def candidate() -> OrtSession | RemoteSession:
        opened.append(where.open(folder))
        return opened[-1]

    # A worker's opener is pickled, and may not fall back: it runs on what was asked for.
    opener = candidate if args.workers == 1 else partial(where.open, folder)
    score("candidate", opener, files, where.settings(), versions())
    found["session"] = opened[0].info.facts if opened else {"provider": where.provider}
    if args.baseline:
        from bench.gate.store import baseline_key
        from runtime.torch_session import TorchSession

        checkpoint = resolve(args.baseline, status=status, allow_pickle=args.allow_pickle).folder
        torch_side = partial(TorchSession, checkpoint, "fp32", where.device, threads=where.threads)
        score("baseline", torch_side, baseline_key(checkpoint, where.device, where.threads))
        found["ratio"] = scores["candidate"].ratio(scores["baseline"])
    show(args, found, "\n".join(lines(found)))
    return 0


def _shown(word_perplexity: float) -> str:
    return f"{word_perplexity:.6f}" if math.isfinite(word_perplexity) else "infinite (few blanks: read the bytes')"


def lines(found: dict[str, Any]) -> list[str]:
    """The result for a terminal."""
    from runtime.session import NOT_AS_ASKED

    rows = [
        f"{side}: word perplexity {_shown(found[side]['word_perplexity'])}, byte perplexity "
        f"{found[side]['byte_perplexity']:.6f}, {found[side]['bits_per_byte']:.6f} bits a byte"
        for side in ("candidate", "baseline")
        if side in found
    ]
    f = found["candidate"]
    rows.append(f"{f['documents']} documents, {f['words']} words, {f['tokens']} tokens; {f['settings']}")
    rows += [f"ratio {found['ratio']:.9f}"] if "ratio" in found else []
    told = found["session"]
    return rows + [f"not run as asked: {told[k]}" for k in NOT_AS_ASKED if k in told]
