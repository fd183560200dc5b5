"""The matrix-product floor: PyTorch's own count of a prefill's operations, and samples of the product asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from bench.latency.prefill_floor import PrefillFloorMeter
from bench.machine.bandwidth import prefill_products
from reports.record import Case
from runtime.matrix_product import MatrixProduct
from runtime.settings import SessionSettings

TOKENS = 40
SMALL = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}


def config_of(model_type: str, **changes: Any) -> Any:
    return AutoConfig.for_model(model_type, **(SMALL | changes), attn_implementation="eager")


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("mistral", {"head_dim": 32, "sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    ],
)
def test_operations_are_those_that_pytorch_counts(model_type: str, changes: dict[str, Any]) -> None:
    """PyTorch eager computes all pairs of tokens; of these only the ones that a token may attend to count."""
    config = config_of(model_type, **changes)
    found = prefill_products(config)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(2 * TOKENS).reshape(2, TOKENS)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(ids, logits_to_keep=1)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = 2 * TOKENS * head // 2  # its angles are a product as well, once for both rows
    attended = [[min(i + 1, w or i + 1) for i in range(TOKENS)] for w in found.windows]
    pairs_left_out = sum(TOKENS * TOKENS - sum(row) for row in attended)
    left_out = 2 * 4 * config.num_attention_heads * head * pairs_left_out
    case = Case(batch=2, prompt=TOKENS, new_tokens=1)
    assert found.operations(case) == counted.get_total_flops() - rotary - left_out
    assert (16 in found.windows) == ("sliding_window" in changes)


def test_each_round_gets_a_sample_of_the_product_of_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    class Noted(MatrixProduct):
        def __init__(self, *arguments: Any) -> None:
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr("bench.latency.prefill_floor.MatrixProduct", Noted)
    meter = PrefillFloorMeter(config_of("llama"), "fp32", SessionSettings("cpu", 1))
    short, long = (Case(batch=2, prompt=p, new_tokens=1) for p in (8, 16))
    for case in (short, long):
        sample = meter.beside(case)
        assert sample is not None
        for _ in range(3):
            sample()
    assert [sizes for *sizes, _ in made] == [[16, 64, 96, "fp32"], [32, 64, 96, "fp32"]]
    assert {(s.provider, s.threads) for *_, s in made} == {("cpu", 1)}
    floor = meter.floor
    assert [(m.case, m.rows, m.inner, m.outer, len(m.samples_s)) for m in floor.measured] == [
        (short, 16, 64, 96, 3),
        (long, 32, 64, 96, 3),
    ]
    assert floor.missing == ""
    assert floor.method == (
        "one matrix product, tokens x 64 by 64 x 96, on ONNX Runtime (cpu, fp32, 1 thread), median of 5 passes, "
        "beside each round"
    )


@pytest.mark.parametrize(
    ("config", "dtype", "why"),
    [
        (AutoConfig.for_model("gpt2"), "fp32", "the matrix products of model type 'gpt2' are not counted"),
        (config_of("llama"), "bf16", "a plain matrix product does not run here: onnxruntime cannot open a graph: "),
    ],
)
def test_where_there_is_no_floor_the_record_says_why(config: Any, dtype: str, why: str) -> None:
    meter = PrefillFloorMeter(config, dtype, SessionSettings("cpu", 1))
    assert meter.beside(Case(batch=1, prompt=8, new_tokens=1)) is None
    assert meter.floor.missing.startswith(why)
    assert meter.floor.measured == []
