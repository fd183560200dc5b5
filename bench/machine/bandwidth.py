"""What the machine allows: memory bandwidth and matrix products, as decode steps and prefills use them.

Try: ``llama-onnx doctor``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from transformers import PretrainedConfig

from export.architectures import architecture_of
from export.process import torch_threads
from export.sizes import head_dim_of, kv_heads_of
from reports.record import Case, PrefillProducts


class CpuBandwidth:
    """Reads memory as a decode step does, larger than any cache; each call gives bytes per second.

    A matrix-vector product is what a decode step consists of, a sum is the plainest read. The faster kernel counts, by
    the median of its passes: like for like with the median decode step that it is held against.
    """

    def __init__(self, threads: int, megabytes: int = 1024, passes: int = 5) -> None:
        self._threads, self._passes = threads, passes
        columns = 8192
        self._matrix = torch.ones((megabytes * (1 << 20) // 4 // columns, columns))
        self._vector = torch.ones(columns)
        self.method = (
            f"faster of a matrix-vector product and a sum over {megabytes} MiB, fp32, {threads} threads, median of "
            f"{passes} passes, beside each round"
        )

    def __call__(self) -> float:
        """One sample, bytes per second."""
        with torch_threads(self._threads):
            kernels = (lambda: torch.mv(self._matrix, self._vector), self._matrix.sum)
            return float(self._matrix.nbytes / min(median_time(k, self._passes) for k in kernels))


class CudaBandwidth:
    """The same on the GPU: sums over a buffer far larger than its caches, synchronised at both ends."""

    def __init__(self, megabytes: int = 4096, passes: int = 5) -> None:
        self._passes = passes
        self._buffer = torch.ones(megabytes * (1 << 20) // 4, device="cuda")
        self.method = f"sum over {megabytes} MiB on the GPU, fp32, median of {passes} passes, beside each round"

    def _read(self) -> None:
        self._buffer.sum()
        torch.cuda.synchronize()

    def __call__(self) -> float:
        """One sample, bytes per second."""
        torch.cuda.synchronize()
        return float(self._buffer.nbytes / median_time(self._read, self._passes))


def layer_matrices(config: PretrainedConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of the matrices of a decoder layer that :mod:`export.architectures` describes, QKV as one."""
    hidden, wide = config.hidden_size, config.intermediate_size
    query, keys = (heads * head_dim_of(config) for heads in (config.num_attention_heads, kv_heads_of(config)))
    return [(hidden, query + 2 * keys), (query, hidden), (hidden, wide), (hidden, wide), (wide, hidden)]


def prefill_products(config: PretrainedConfig) -> PrefillProducts:
    """The matrix products of a prompt.

    Raises:
        UnsupportedModelError: an architecture that nobody described.
    """
    windows = architecture_of(config).windows(config)
    return PrefillProducts(
        layer_weights=config.num_hidden_layers * sum(k * n for k, n in layer_matrices(config)),
        head_weights=config.hidden_size * config.vocab_size,
        attention_width=config.num_attention_heads * head_dim_of(config),
        windows=list(windows),
    )


class GemmFloor:
    """Least seconds of a prefill's matrix products, measured now: the better of two ways to know it.

    One runs the model's own products on PyTorch, one after another, each with weights of its own; the other divides
    their operations by the rate of a product of 1,024 x 1,024 x 1,536. The head counts for one position.
    """

    def __init__(self, config: PretrainedConfig, tokens: int) -> None:
        shapes = layer_matrices(config)
        self._weights = [torch.randn(k, n) for _ in range(config.num_hidden_layers) for k, n in shapes]
        self._inputs = {k: torch.randn(tokens, k) for k, _ in shapes}
        self._square = torch.randn(1024, 1024), torch.randn(1024, 1536)
        self._operations = prefill_products(config).operations(Case(batch=1, prompt=tokens, new_tokens=1))

    def __call__(self) -> float:
        """Seconds."""
        rate = 2 * 1024 * 1024 * 1536 / median_time(lambda: torch.mm(*self._square), 9)

        def products() -> None:
            for w in self._weights:
                torch.mm(self._inputs[len(w)], w)

        return float(min(self._operations / rate, median_time(products, 3)))


def median_time(action: Callable[[], object], passes: int) -> float:
    """Median seconds of ``passes`` calls."""
    times = []
    for _ in range(passes):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
