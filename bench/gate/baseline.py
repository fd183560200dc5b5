"""The baseline's side of every check, asked in one place, so that what it computed once is not computed again.

Where results are kept (:mod:`bench.gate.store`: by content, bounded, hashed), they outlive the process: the next folder
need not wait for PyTorch, and a run that was killed goes on where it stopped. Checks call nothing else of the PyTorch
model. Try: ``llama-onnx validate FOLDER --baseline demo --only mean_kld`` twice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.digests import DigestError, baseline_digest, hash_baseline
from bench.errors import BaselineError
from bench.gate.store import ResultStore, Say, baseline_key
from export.cache import CACHE_ENV, cache_dir
from export.convert import Conversion, convert
from export.manifest import first_line
from export.pipeline import eos_ids, load_config
from export.process import blocks_apart
from export.sizes import context_length, head_dim_of
from export.source import Source
from export.spec import ExportSpec
from export.spelling import cache_keyword
from export.weights import Checkpoint
from runtime.generate import generate
from runtime.kv_cache import Loud, tiled
from runtime.session import Logits
from runtime.torch_session import TorchSession

Past = list[tuple[NDArray[Any], NDArray[Any]]]
Tokens = tuple[tuple[int, ...], ...]


class Baseline:
    """A checkpoint on PyTorch in fp32.

    Args:
        source: the checkpoint.
        threads: PyTorch's threads; part of the key, because PyTorch does not promise equal bits across them.
        memo_bytes: how much of :meth:`score`'s results to keep in memory, for runs over many folders.
        keep: whether results are kept on the disk.
        root: where; None takes the user's cache.
        say: told in one line about damaged entries and a bound that is too small.
        device: ``cpu`` or ``cuda``, where PyTorch computes (:attr:`bench.deployment.Deployment.device`).
    """

    def __init__(
        self,
        source: Source,
        threads: int,
        memo_bytes: int = 0,
        keep: bool = False,
        root: Path | None = None,
        say: Say = lambda _: None,
        device: str = "cpu",
    ) -> None:
        self.source, self.threads, self.device = source, threads, device
        self._room, self._keep, self._root, self._say = memo_bytes, keep, root, say
        self._scores: dict[tuple[str, tuple[int, ...]], Logits] = {}
        self._tokens: dict[Any, Tokens] = {}
        self._continued: dict[Any, tuple[Past, Logits]] = {}
        self._residuals: dict[Any, list[dict[str, NDArray[np.float32]]]] = {}
        self._conversions: dict[tuple[str, str], Conversion] = {}
        self._sessions: dict[str, TorchSession] = {}

    @contextmanager
    def at_fault(self) -> Iterator[None]:
        """What goes wrong in here is the baseline's, not the folder's.

        Raises:
            BaselineError: in place of whatever it was.
        """
        try:
            yield
        except (BaselineError, MemoryError):
            raise
        except Exception as e:  # transformers', safetensors', PyTorch's or ours
            raise BaselineError(f"the baseline {self.source.name}: {first_line(e)}") from e

    @cached_property
    def store(self) -> ResultStore | None:
        """Its results on the disk; None: not kept."""
        if not self._keep:
            return None
        with self.at_fault():
            key = baseline_key(self.checkpoint, self.device, self.threads, self.hashes)
        return ResultStore(key, self._root, say=self._say)

    @property
    def key(self) -> str:
        """Digest of everything that decides the results; "" where none are kept."""
        return self.store.key if self.store else ""

    def recipe(self) -> Callable[[], Baseline]:
        """What opens such a baseline, with the same results, in another process."""
        root = self._root or (cache_dir() / "baseline" if os.environ.get(CACHE_ENV) else None)
        return partial(
            Baseline, self.source, self.threads, keep=self._keep, root=root, say=print_error, device=self.device
        )

    def _stored(self, request: Any, compute: Callable[[], Logits]) -> Logits:
        """An fp32 matrix from the store, or computed now and kept."""
        kept = self.store.array(request) if self.store else None
        if kept is None:
            with self.at_fault():
                kept = compute()
            if self.store:
                self.store.keep_array(request, kept)
        return kept

    @property
    def checkpoint(self) -> Path:
        """Folder of config.json and safetensors."""
        return self.source.folder

    @cached_property
    def hashes(self) -> dict[str, dict[str, str]]:
        """SHA-256 of its files, read once; see :func:`bench.digests.hash_baseline`."""
        return hash_baseline(self.checkpoint)

    @property
    def digest(self) -> str:
        """One SHA-256 over names and contents of its weights, configuration and tokenizer; "" without weights."""
        try:
            return baseline_digest(self.hashes)
        except DigestError:
            return ""

    @cached_property
    def config(self) -> Any:
        """transformers' configuration."""
        with self.at_fault():
            return load_config(self.source)

    @property
    def context(self) -> int:
        """Tokens that it can hold."""
        return context_length(self.config)

    @cached_property
    def tensors(self) -> Checkpoint:
        """The checkpoint's tensors, read one by one."""
        with self.at_fault():
            return Checkpoint(self.checkpoint)

    def conversion(self, spec: ExportSpec, data_file: str) -> Conversion:
        """What the export makes of this configuration; traced once for each request."""
        key = (spec.digest, data_file)
        if key not in self._conversions:
            self._conversions[key] = convert(self.config, spec, data_file)
        return self._conversions[key]

    @cached_property
    def eos(self) -> tuple[int, ...]:
        """End-of-sequence ids."""
        with self.at_fault():
            return eos_ids(self.checkpoint, self.config)

    @property
    def session(self) -> TorchSession:
        """The model itself, loaded when something has to be computed."""
        return self._session("fp32")

    def _session(self, precision: str) -> TorchSession:
        if precision not in self._sessions:
            with self.at_fault():
                opened = TorchSession(self.checkpoint, precision, self.device, threads=self.threads)
            self._sessions[precision] = opened
        return self._sessions[precision]

    def score(self, ids: Sequence[int]) -> Logits:
        """Logits at every position, ``[length, vocab]`` fp32."""
        return self._score("fp32", ids)

    def score_at(self, ids: Sequence[int], places: Sequence[int]) -> Logits:
        """As :meth:`score`, at some positions only, ``[len(places), vocab]``: of a long text the rest takes memory."""
        request = ["score at", list(ids), list(places)]
        return self._stored(request, lambda: self.session.score(ids, places))

    def null_score(self, kind: str, ids: Sequence[int]) -> Logits:
        """As :meth:`score`, by a null control: ``eager`` (fp32, another kernel), ``fp16`` or ``bf16``."""
        return self._score(kind, ids)

    def _score(self, kind: str, ids: Sequence[int]) -> Logits:
        key = (kind, tuple(ids))
        if key in self._scores:
            return self._scores[key]
        logits = self._stored(["score", kind, list(ids)], lambda: self._compute_score(kind, ids))
        if logits.nbytes <= self._room:
            self._room -= logits.nbytes
            self._scores[key] = logits.copy()
        return logits

    def _compute_score(self, kind: str, ids: Sequence[int]) -> Logits:
        with self._as(kind) as session:
            return session.score(ids)

    @contextmanager
    def _as(self, kind: str) -> Iterator[TorchSession]:
        """The model as a null control has it: ``eager`` is the same weights through another attention kernel."""
        if kind == "eager":
            model = self.session.model
            usual = model.config._attn_implementation
            model.set_attn_implementation("eager")
            try:
                yield self.session
            finally:
                model.set_attn_implementation(usual)
        else:
            yield self._session(kind)

    def drop_nulls(self) -> None:
        """Free the null controls' models, so that never more than two models are in memory for long."""
        for kind in self._sessions.keys() - {"fp32"}:
            self._sessions.pop(kind).close()

    def tokens(self, prompts: Sequence[Sequence[int]], limit: int) -> Tokens:
        """Greedy generations of a batch, at most ``limit`` new tokens each, end token included."""
        key = (tuple(map(tuple, prompts)), limit)
        if key not in self._tokens:
            request = ["tokens", [list(p) for p in prompts], limit, list(self.eos)]
            made = self.store.value(request) if self.store else None
            if made is None:
                with self.at_fault():
                    made = generate(self.session, prompts, limit, self.eos).tokens
                if self.store:
                    self.store.keep_value(request, made)
            self._tokens[key] = tuple(tuple(row) for row in made)
        return self._tokens[key]

    def continued(
        self, text: Sequence[int], length: int, ids: Sequence[int], loud: Loud | None = None
    ) -> tuple[Past, Logits]:
        """``ids`` after a past of ``length`` tokens that is the cache of ``text``, tiled.

        Reaching position 8,000 by computing costs minutes; its keys need not mean anything, since both sides get the
        same ones. What is tested is what happens at those positions: rotary rows, lengths, windows. One token of the
        past may be ``loud``: one of 4,096 does not change the logits measurably otherwise.

        Returns:
            The cache of ``text``, per layer a key and a value ``[1, kv_heads, len(text), head_dim]`` fp32, which the
            other side tiles itself (:func:`runtime.kv_cache.tiled`: the whole past of the demo model takes
            0.4 GB, so that it is in memory once at a time); and logits ``[len(ids), vocab]``.
        """
        key = (tuple(text), length, tuple(ids), loud)
        if key not in self._continued:
            flat = self._stored(["past", list(text)], lambda: self._past_of(text))
            whole = flat.reshape(len(flat) // 2, 2, 1, -1, len(text), head_dim_of(self.config))
            first = [(k, v) for k, v in whole]
            request = ["after past", list(text), length, list(ids), *(loud or ())]
            self._continued[key] = (first, self._stored(request, lambda: self._after_past(first, length, ids, loud)))
        return self._continued[key]

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self.device)

    def _past_of(self, text: Sequence[int]) -> NDArray[np.float32]:
        """The cache of one text, a row for each layer's key and for its value."""
        from transformers import DynamicCache

        model = self.session.model
        cache = DynamicCache()  # without the configuration: whole in layers with a window too, as a graph keeps it
        with torch.inference_mode():
            model(input_ids=self._tensor(text), **{cache_keyword(model.forward): cache}, use_cache=True)
        return np.stack([t.float().cpu().numpy().ravel() for layer in cache.layers for t in (layer.keys, layer.values)])

    def _after_past(self, first: Past, length: int, ids: Sequence[int], loud: Loud | None) -> Logits:
        """Logits ``[len(ids), vocab]`` of ``ids`` after ``length`` tokens of ``first``, the cache of a text."""
        from transformers import DynamicCache

        model = self.session.model
        cache = DynamicCache()
        with torch.inference_mode(), blocks_apart(1 << 20):  # a layer's cache grows by a copy
            for i, (k, v) in enumerate(first):  # tiled layer by layer: the cache makes a copy of its own
                whole = (tiled(k, length), tiled(v, length, loud))
                key, value = (torch.from_numpy(x).to(self.device) for x in whole)
                cache.update(key, value, i)
            inputs = {"input_ids": self._tensor(ids)}
            if "position_ids" in signature(model.forward).parameters:  # Bloom has none
                inputs["position_ids"] = torch.arange(length, length + len(ids), device=self.device)[None]
            logits = model(**inputs, **{cache_keyword(model.forward): cache}, use_cache=True).logits[0]
        found: Logits = logits.float().cpu().numpy()
        return found

    def residuals(self, ids: Sequence[int]) -> list[dict[str, NDArray[np.float32]]]:
        """Values inside each layer: ``input``, ``qkv``, ``attention``, ``o_proj``, ``mlp``, ``output``.

        Each ``[length, width]`` fp32; ``input`` is the residual stream before the layer, ``output`` after it.
        """
        return self.null_residuals("fp32", ids)

    def null_residuals(self, kind: str, ids: Sequence[int]) -> list[dict[str, NDArray[np.float32]]]:
        """As :meth:`residuals`, by a null control (see :meth:`null_score`)."""
        key = (kind, tuple(ids))
        if key not in self._residuals:
            with self.at_fault(), self._as(kind) as session:
                self._residuals[key] = _residuals(session.model, self._tensor(ids))
        return self._residuals[key]

    @cached_property
    def tables(self) -> list[torch.Tensor]:
        """What the model computes from its configuration alone, each flat in fp64: rotary frequencies, sinusoids,
        ALiBi's biases."""
        model = self.session.model
        kept = [value for module in model.modules() for value in vars(module).values()]  # GPT-J's is no buffer
        found = [t for t in (*model.buffers(), *kept) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if self.config.model_type == "mpt":  # in its forward pass
            from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

            most = self.config.attn_config.alibi_bias_max
            found.append(build_mpt_alibi_tensor(self.config.num_attention_heads, self.context, most))
        return [t.flatten().double().cpu() for t in found]

    def rope_rows(self, kind: str, rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """``cos`` or ``sin`` ``[rows, head_dim / 2]`` in fp64 from transformers' frequencies, and what fp32 angles may
        be off at each place (half a unit in the last place of the angle, and of the result)."""
        from export.architectures import ARCHITECTURES

        # Third-party graphs may have tables for an architecture that is not described here: LLaMA's are the usual ones.
        rotary: Any = ARCHITECTURES.get(self.config.model_type, ARCHITECTURES["llama"]).rotary(self.config)
        angles = np.arange(rows, dtype=np.float64)[:, None] * rotary.inv_freq.double().numpy()[None]
        function = np.cos if kind == "cos" else np.sin
        return function(angles) * float(rotary.attention_scaling), np.abs(angles) * 2.0**-23 + 2.0**-22

    def close(self) -> None:
        """Free every model."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()


def print_error(message: str) -> None:
    """A line on standard error, for workers."""
    print(message, file=sys.stderr)


def _residuals(model: Any, ids: torch.Tensor) -> list[dict[str, NDArray[np.float32]]]:
    found: list[dict[str, Any]] = [{} for _ in model.model.layers]

    def keep(k: int, name: str, of_input: bool = False) -> Any:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            value = inputs[0] if of_input else output
            value = value[0] if isinstance(value, tuple) else value
            found[k][name] = value[0].float().cpu().numpy().copy()

        return hook

    handles = []
    for k, layer in enumerate(model.model.layers):
        handles += [
            layer.input_layernorm.register_forward_hook(keep(k, "input", of_input=True)),
            layer.self_attn.q_proj.register_forward_hook(keep(k, "q")),
            layer.self_attn.k_proj.register_forward_hook(keep(k, "k")),
            layer.self_attn.v_proj.register_forward_hook(keep(k, "v")),
            layer.self_attn.o_proj.register_forward_hook(keep(k, "attention", of_input=True)),
            layer.self_attn.o_proj.register_forward_hook(keep(k, "o_proj")),
            layer.mlp.register_forward_hook(keep(k, "mlp")),
            layer.register_forward_hook(keep(k, "output")),
        ]
    try:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for values in found:
        values["qkv"] = np.concatenate([values.pop("q"), values.pop("k"), values.pop("v")], axis=-1)
    return found
