"""The matrix-product floor of prefills: what the prompt's products would take at the speed of one plain product.

Try: ``pytest bench/ --profile smoke -k prefill``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PretrainedConfig

from bench.machine.bandwidth import median_time, prefill_products
from export.errors import ExportError
from reports.record import Case, PrefillFloor, PrefillProducts, ProductSamples
from runtime.errors import SessionError
from runtime.matrix_product import MatrixProduct
from runtime.settings import SessionSettings

PASSES = 5
"""Runs of the product whose median is one sample."""


class PrefillFloorMeter:
    """Measures a product of the model's own shapes beside the rounds, as the candidate runs.

    Args:
        config: of the model.
        dtype: of the candidate's activations. Integer weights have kernels of their own; the product is a plain one.
        settings: the candidate's provider, threads and options.
    """

    def __init__(self, config: PretrainedConfig, dtype: str, settings: SessionSettings) -> None:
        self._dtype = dtype
        # The product's threads must not spin into the round that follows.
        entries = {"session.force_spinning_stop": "1", **(settings.session_options or {})}
        self._settings = replace(settings, session_options=entries)
        self._sizes = (0, 0)
        self._samples: list[tuple[Case, list[float]]] = []
        self._products: PrefillProducts | None = None
        self._missing = ""
        try:
            self._products = prefill_products(config)
            self._sizes = config.hidden_size, config.intermediate_size
        except ExportError:
            self._missing = f"the matrix products of model type {config.model_type!r} are not counted"

    def beside(self, case: Case) -> Callable[[], None] | None:
        """What takes one sample for a round of that case; None where there is no floor, :attr:`floor` says why."""
        if self._missing:
            return None
        try:
            product = MatrixProduct(case.batch * case.prompt, *self._sizes, self._dtype, self._settings)
        except SessionError as e:
            self._missing = f"a plain matrix product does not run here: {e}"
            return None
        samples: list[float] = []
        self._samples.append((case, samples))
        return lambda: samples.append(median_time(product.run, PASSES))

    @property
    def floor(self) -> PrefillFloor:
        """What was measured so far."""
        provider, threads, (inner, outer) = self._settings.provider, self._settings.threads, self._sizes
        where = f"{provider}, {self._dtype}" + (
            f", {threads} thread{'s' * (threads != 1)}" if provider == "cpu" else ""
        )
        product = f"one matrix product, tokens x {inner:,} by {inner:,} x {outer:,}, on ONNX Runtime ({where})"
        return PrefillFloor(
            method=f"{product}, median of {PASSES} passes, beside each round",
            dtype=self._dtype,
            products=self._products,
            measured=[
                ProductSamples(case=case, rows=case.batch * case.prompt, inner=inner, outer=outer, samples_s=samples)
                for case, samples in self._samples
                if samples
            ],
            missing=self._missing,
        )
