"""Body of ``llama-onnx perplexity``: word perplexity of a folder, beside its baseline where one is named.

Each window's result is kept by content (:mod:`bench.gate.store`): a run that was killed goes on, a baseline is scored
once for all its folders. ``--workers`` shares the windows (:mod:`bench.process.workers`).
Try: ``llama-onnx perplexity FOLDER --dataset hf:wikitext --baseline demo``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.data.loading import Dataset
    from bench.gate.word_perplexity import Window, WordPerplexity
    from runtime.session import Session

Say = Callable[[str], None]


def add_command(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The command's options; ``add(name, help)`` makes a sub-parser."""
    sub = add("perplexity", "word perplexity of an exported folder (WikiText-2 as lm-evaluation-harness computes it)")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--dataset", help="hf:wikitext, hf:/path/to/copy:wikitext, or JSONL (default: the project's own)")
    sub.add_argument("--baseline", help="'demo', a checkpoint folder, ...: its figure beside it, through the cache")
    sub.add_argument("--window", type=int, help="tokens of a window (default: the context, at most 2048)")
    sub.add_argument("--limit", type=int, help="only the first documents")
    sub.add_argument("--provider", default="cpu", help="cpu, cuda or tensorrt")
    sub.add_argument("--threads", type=int, help="CPU threads of each worker (default: every core)")
    sub.add_argument("--workers", type=int, default=1, help="processes that share the work, through Ray")


def open_candidate(folder: Path, provider: str, threads: int) -> Session:
    """The folder on ONNX Runtime; hashes were checked by the caller."""
    from runtime.loading import load

    return load(folder, provider, threads, verify=False)


def open_baseline(checkpoint: Path, device: str, threads: int) -> Session:
    """The checkpoint on PyTorch in fp32."""
    from runtime.torch_session import TorchSession

    return TorchSession(checkpoint, "fp32", device, threads=threads)


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

    ``key`` holds what decides them besides the windows: the digest of the files, provider, threads.
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


def limited(dataset: Dataset, documents: int | None) -> Dataset:
    """The first perplexity documents only."""
    from dataclasses import replace

    items = tuple(i for i in dataset.items if i.task == "perplexity")
    return replace(
        dataset, items=items[:documents], name=f"{dataset.name}, first {documents}" if documents else dataset.name
    )


def figures(found: WordPerplexity) -> dict[str, Any]:
    """The figures as JSON."""
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


def run(args: argparse.Namespace, say: Say, bar: Callable[[str, int], Any]) -> dict[str, Any]:
    """Score the folder, and the baseline if one is named; returns the JSON document of the command."""
    from bench.data.loading import load_dataset
    from bench.gate.word_perplexity import assemble, document_windows
    from bench.machine.environment import versions
    from export.source import resolve
    from runtime.loading import read_folder
    from runtime.text import load_tokenizer

    folder = args.folder.expanduser()
    manifest = read_folder(folder)
    dataset = limited(load_dataset(args.dataset), args.limit)
    windows = document_windows(dataset, load_tokenizer(folder), manifest.context_length, args.window)
    threads = args.threads or len(os.sched_getaffinity(0))
    device = "cpu" if args.provider == "cpu" else "cuda"
    gpus = 0 if device == "cpu" else 1
    files = sorted((name, entry.sha256) for name, entry in manifest.files.items())
    key = ["candidate", files, args.provider, threads, versions()]
    found: dict[str, Any] = {"dataset": dataset.name, "dataset_sha256": dataset.sha256, "workers": args.workers}
    with bar("candidate", len(windows)) as tick:
        opener = partial(open_candidate, folder, args.provider, threads)
        nats = scored(opener, windows, key, args.workers, say, tick, gpus)
    found["candidate"] = figures(assemble(dataset, windows, nats))
    if args.baseline:
        from bench.gate.store import baseline_key

        checkpoint = resolve(args.baseline, status=say).folder
        key = ["baseline", baseline_key(checkpoint, device, threads)]
        with bar("baseline", len(windows)) as tick:
            opener = partial(open_baseline, checkpoint, device, threads)
            nats = scored(opener, windows, key, args.workers, say, tick, gpus)
        found["baseline"] = figures(assemble(dataset, windows, nats))
        found["ratio"] = found["candidate"]["word_perplexity"] / found["baseline"]["word_perplexity"]
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The result for a terminal."""
    rows = [
        f"{side}: word perplexity {found[side]['word_perplexity']:.6f}, byte perplexity "
        f"{found[side]['byte_perplexity']:.6f}, {found[side]['bits_per_byte']:.6f} bits a byte"
        for side in ("candidate", "baseline")
        if side in found
    ]
    f = found["candidate"]
    rows.append(f"{f['documents']} documents, {f['words']} words, {f['tokens']} tokens; {f['settings']}")
    return rows + ([f"ratio {found['ratio']:.9f}"] if "ratio" in found else [])
