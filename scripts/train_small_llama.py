"""A small LLaMA, trained from scratch in minutes: a checkpoint whose weights were never quantised.

The demo model was read from a 4-bit file, which flatters quantisers that find those blocks again (HQQ); on weights that
only ever were fp32 the int4 methods can be compared. The text is the project's own (``bench/data``), little enough that
the model learns words and phrases, no facts: its metrics say how methods compare, not what LLaMA 2 would lose.

Held out: all of ``prose.jsonl`` (``bench.studies.export_table`` scores windows of any of its texts; which ones depends
on the tokenizer and on ``--windows``), and for validation every tenth source text of the other four files with all
items made from it. Neither weights nor tokenizer see them. What ``gptq`` is calibrated on (``Dataset.calibration()``)
is mostly text that was trained on, as it is for published models.

The model sees this little text some twelve times. Unhindered it learns it by heart (4 minutes: training loss 0.4, prose
7.6, worse than token frequencies), so a fifth of the input tokens are random, weight decay is high, and the weights of
the lowest validation loss are kept.

Losses are nats per token, beside the cross-entropy of the training text's token frequencies on the same tokens. The
same ``--steps``, ``--seed`` and ``--threads`` on the same machine and torch give the same weights; ``--minutes`` times
a few steps and then fixes their number, which the summary names.
Try: ``python scripts/train_small_llama.py /tmp/small-llama --minutes 1``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.data.items import Dataset, Item, chunked
from bench.data.loading import load_shipped
from export.cache import publish
from export.errors import DestinationError, ExportError

ORIGIN = "small LLaMA trained from scratch on the project's own text"
MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
    "initializer_range": 0.06,  # about 1 / sqrt(hidden_size); transformers' 0.02 learns much slower at this size
    "tie_word_embeddings": False,
}
SPECIAL = ("<unk>", "<s>", "</s>")
TEMPLATE = (
    "{% for m in messages %}{{ bos_token + m['role'] + '\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)
VALIDATION_EVERY = 10
SCORED_WINDOW = 256
"""Tokens of a window in :mod:`bench.studies.export_table`."""
LEARNING_RATE, WARM_UP, FLOOR = 1.5e-3, 0.05, 0.05
"""Highest learning rate; share of the steps until it is reached; share of it that is left at the end."""
WEIGHT_DECAY, BETAS, CLIP = 0.5, (0.9, 0.95), 1.0
NOISE = 0.2
"""Share of a crop's input tokens that are replaced by tokens of elsewhere; what is to be predicted stays."""
DIVERGED = "the training diverged (loss not finite); nothing was written, try another --seed"
EXTRAPOLATED = 6
"""Steps that ``--minutes`` times, the first two not counted."""

Progress = Callable[[int, int, float, float | None], None]
"""Told (steps done, steps in all, training loss of this step, validation loss where it was measured)."""


@dataclass(frozen=True)
class Losses:
    """Nats per token on one text: of the model, and of the training text's token frequencies (add-one smoothed)."""

    model: float
    unigram: float
    tokens: int


@dataclass(frozen=True)
class Trained:
    """What was written: the weights after step ``kept``. ``batches`` holds every step's training loss (with noise)."""

    folder: Path
    parameters: int
    steps: int
    kept: int
    seconds: float
    batches: tuple[float, ...]
    train: Losses
    validation: Losses
    prose: Losses


def dialogue(item: Item) -> list[dict[str, str]]:
    """An item as a conversation: the request, and its first reference as the answer."""
    return [{"role": "user", "content": item.instruction}, {"role": "assistant", "content": item.references[0]}]


def split(data: Dataset) -> tuple[list[Item], list[Item]]:
    """Items to train on and to validate on; no source text (a context, a sentence) is in both."""
    items = [i for i in data.items if i.task != "perplexity"]
    sources = list(dict.fromkeys(i.fields.get("context", i.fields.get("text")) for i in items))
    held = set(sources[VALIDATION_EVERY - 1 :: VALIDATION_EVERY])
    validation = [i for i in items if i.fields.get("context", i.fields.get("text")) in held]
    return [i for i in items if i not in validation], validation


def texts_of(items: Sequence[Item]) -> list[str]:
    """Every text of the items once: sources, questions, instructions, references."""
    return list(dict.fromkeys(t for i in items for t in (*i.fields.values(), *i.references) if len(t) > 2))


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Byte-level BPE of at most ``vocabulary`` tokens with ``<s>`` before every text, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    unknown, bos, eos = SPECIAL
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, bos_token=bos, eos_token=eos)
    fast.chat_template = TEMPLATE
    return fast


def stream(items: Sequence[Item], tokenizer: Any) -> Tensor:
    """Token ids [n]: the conversations (of questions, which repeat their context, none) and every text on its own."""
    ids: list[int] = []
    for item in items:
        if item.task != "qa":
            ids += tokenizer.apply_chat_template(dialogue(item), return_dict=False)
    for text in texts_of(items):
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids)


def rate(step: int, steps: int) -> float:
    """Share of the highest learning rate at a step: linear warm-up, then a cosine down to :data:`FLOOR`."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


@torch.no_grad()
def loss_on(model: Any, windows: Sequence[Tensor]) -> float:
    """Mean loss over all predicted tokens of the windows [length], nats."""
    total, count = 0.0, 0
    for ids in windows:
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total += float(cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    return total / count


def _windows(ids: Tensor, length: int) -> list[Tensor]:
    return [w for w in torch.split(ids, length) if len(w) > 1]


def _losses(model: Any, windows: Sequence[Tensor], counts: Tensor) -> Losses:
    frequencies = ((counts + 1) / (counts + 1).sum()).log()
    predicted = torch.cat([w[1:] for w in windows])
    return Losses(loss_on(model, windows), -float(frequencies[predicted].mean()), len(predicted))


class _Run:
    """A model, its optimiser and its random crops, all from one seed."""

    def __init__(self, config: Any, ids: Tensor, window: int, batch: int, seed: int) -> None:
        from transformers import LlamaForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Any = LlamaForCausalLM(config)
        self._ids, self._window, self._batch = ids, min(window, len(ids)), batch
        self._crops = torch.Generator().manual_seed(seed)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        norms = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
        self._optimiser = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)

    def step(self, share: float) -> float:
        """One update at ``share`` of the highest learning rate; the batch's loss before it.

        Raises:
            ExportError: the loss is not finite.
        """
        starts = torch.randint(0, len(self._ids) - self._window + 1, (self._batch,), generator=self._crops)
        batch = torch.stack([self._ids[s : s + self._window] for s in starts.tolist()])
        for group in self._optimiser.param_groups:
            group["lr"] = LEARNING_RATE * share
        strange = self._ids[torch.randint(0, len(self._ids), batch.shape, generator=self._crops)]
        noisy = torch.where(torch.rand(batch.shape, generator=self._crops) < NOISE, strange, batch)
        loss = self.model(input_ids=noisy, labels=batch).loss
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self._optimiser.step()
        if not math.isfinite(loss.item()):
            raise ExportError(DIVERGED)
        return float(loss.item())


def steps_for(minutes: float, make: Callable[[], _Run]) -> int:
    """How many steps take that long, from timing a few on a model that is thrown away."""
    run, seconds = make(), []
    for _ in range(EXTRAPOLATED):
        started = time.perf_counter()
        run.step(0.1)
        seconds.append(time.perf_counter() - started)
    timed = sorted(seconds[2:])
    return max(1, round(minutes * 60 / timed[len(timed) // 2]))


def train(
    out: Path,
    steps: int | None = None,
    minutes: float = 4.0,
    seed: int = 0,
    *,
    model: Mapping[str, Any] = MODEL,
    vocabulary: int = 2000,
    window: int = 512,
    batch: int = 1,
    evaluations: int = 20,
    progress: Progress = lambda *_: None,
) -> Trained:
    """Train and write a checkpoint: fp32 safetensors, config.json, tokenizer. Nothing is written if it fails.

    Args:
        out: the folder to appear; missing or empty.
        steps: updates; by default as many as ``minutes`` allow.
        minutes: about how long the training takes, without ``steps``.
        seed: of the first weights and of the crops.
        model: fields of ``LlamaConfig``.
        vocabulary: most tokens of the tokenizer.
        window: tokens of a training crop.
        batch: crops in a step.
        evaluations: how often validation loss is measured; of these weights the best are kept.
        progress: told of every step.

    Raises:
        DestinationError: ``out`` is not empty, or cannot be written.
        ExportError: the training diverged.
    """
    from transformers import LlamaConfig

    out = out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DestinationError(f"{out} is there already and not empty; nothing was changed, choose another OUT")
    data = load_shipped()
    training, validation = split(data)
    tokenizer = make_tokenizer(texts_of(training), vocabulary)
    ids, held = stream(training, tokenizer), stream(validation, tokenizer)
    chunks = [torch.tensor(w) for t in data.prose() for w in chunked(tokenizer(t)["input_ids"], SCORED_WINDOW)]
    config = LlamaConfig(
        **model,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
        llama_onnx_origin=ORIGIN,
    )

    def make() -> _Run:
        return _Run(config, ids, window, batch, seed)

    try:
        with publish(out) as work:
            total = steps or steps_for(minutes, make)
            run, batches = make(), []
            every = max(1, math.ceil(total / max(1, evaluations)))
            kept, best, weights = 0, math.inf, {}
            started = time.perf_counter()
            for step in range(total):
                batches.append(run.step(rate(step, total)))
                due = (step + 1) % every == 0 or step + 1 == total
                found = loss_on(run.model, _windows(held, window)) if due else None
                if found is not None and found < best:
                    kept, best = step + 1, found
                    weights = {name: w.clone() for name, w in run.model.state_dict().items()}
                progress(step + 1, total, batches[-1], found)
            seconds = time.perf_counter() - started
            if not weights:
                raise ExportError(DIVERGED)
            run.model.load_state_dict(weights)
            run.model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            counts = torch.bincount(ids, minlength=config.vocab_size).double()
            parts = (_windows(ids, window), _windows(held, window), chunks)
            losses = [_losses(run.model, windows, counts) for windows in parts]
    except OSError as e:
        raise DestinationError(f"{out} cannot be written ({e.strerror or e}); choose another OUT") from None
    parameters = sum(p.numel() for p in run.model.parameters())
    return Trained(out, parameters, total, kept, seconds, tuple(batches), *losses)


def _show(console: Console) -> tuple[Any, Progress]:
    """A progress bar, and what updates it; every validation loss also stays as a line."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("timing a few steps", total=None)

    def update(done: int, total: int, loss: float, validation: float | None) -> None:
        bar.update(task, completed=done, total=total, description=f"train {loss:.3f}")
        if validation is not None:
            bar.console.print(f"step {done}: train {loss:.3f}, validation {validation:.3f}", style="dim")

    return bar, update


def _summary(result: Trained) -> str:
    lines = [
        f"{result.folder}: {result.parameters:,} parameters, {result.steps} steps in {result.seconds:.0f} s, "
        f"kept: step {result.kept}",
        "loss, nats per token (that of token frequencies; tokens):",
    ]
    named = (("train", result.train), ("validation", result.validation), ("held-out prose", result.prose))
    return "\n".join(lines + [f"  {n} {x.model:.3f} ({x.unigram:.3f}; {x.tokens:,})" for n, x in named])


def _positive(kind: type[int] | type[float]) -> Callable[[str], Any]:
    def parse(text: str) -> int | float:
        value = kind(text)
        if not (math.isfinite(value) and value > 0):
            raise ValueError
        return value

    parse.__name__ = "positive number"  # argparse: "invalid positive number value: '0'"
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(description="train a small LLaMA from scratch on the project's own text")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to appear")
    parser.add_argument("--minutes", type=_positive(float), default=4.0, help="about how long (default: 4)")
    parser.add_argument("--steps", type=_positive(int), help="exactly this many steps instead")
    parser.add_argument("--seed", type=int, default=0, help="of weights and crops (default: 0)")
    parser.add_argument("--threads", type=_positive(int), help="PyTorch's threads")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    bar, update = _show(console)
    try:
        with bar:
            result = train(args.out, args.steps, args.minutes, args.seed, progress=update)
    except ExportError as e:
        console.print(f"error: {e}", style="red", markup=False, highlight=False)
        return e.exit_code
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written")
        return 130
    print(_summary(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
