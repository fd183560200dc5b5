"""Named checks one by one: what each is there for, and that it stays quiet where nothing is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bench.defects.workshop import Workshop
from bench.deployment import Deployment
from bench.gate.checks import numeric
from bench.gate.found import Found
from bench.gate.localize import localize
from bench.gate.modes import MODES
from bench.gate.registry import BY_NAME, CHECKS
from bench.gate.validate import Gate, chosen_checks, make_subject, validate
from runtime.errors import ProviderUnavailableError

Exports = Callable[..., Path]
Workshops = Callable[..., Workshop]


def found(name: str, subject: Any) -> Found:
    return BY_NAME[name].run(subject)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_a_true_export_passes_every_exact_check(precision: str, exports: Exports, subjects: Callable[..., Any]) -> None:
    subject = subjects(exports(precision, num_hidden_layers=4), num_hidden_layers=4)
    gate = Gate(subject)
    results = [gate.result(c) for c in gate.specs if c.kind == "exact"]
    assert {r.name: r.summary for r in results if r.status not in ("PASS", "REPORTED")} == {}
    assert sum(r.status == "PASS" for r in results) >= 9


@pytest.mark.parametrize("method", ["rtn", "hqq", "kquant", "gptq"])
@pytest.mark.parametrize("zero_points", ["integer", "float", "none"])
def test_the_audit_knows_each_quantiser(
    method: str, zero_points: str, exports: Exports, subjects: Callable[..., Any]
) -> None:
    folder = exports("int4", {"method": method, "zero_points": zero_points})
    result = found("weights", subjects(folder))
    assert result.status == "PASS", result.summary


@pytest.mark.parametrize(
    ("method", "zero_points", "bit"),
    [("rtn", "integer", 1), ("rtn", "integer", 2), ("rtn", "none", 1), ("hqq", "float", 2), ("hqq", "none", 2)],
)
def test_a_code_that_is_off_is_outside_the_bound(
    method: str, zero_points: str, bit: int, workshop: Workshops, subjects: Callable[..., Any]
) -> None:
    shop = workshop("int4", {"method": method, "zero_points": zero_points})
    name = next(w.name for w in shop.manifest.weights if w.name.endswith("up_proj.weight.codes"))
    with shop.weight(name) as codes:
        codes[5, 1, 3] ^= bit
    result = found("weights", subjects(shop.folder))
    assert result.status == "FAIL"
    assert result.findings[0].where == name


def test_gptq_may_move_error_but_not_rows(workshop: Workshops, subjects: Callable[..., Any]) -> None:
    """GPTQ is held by whole tensors only; rows that slid by one stay far outside what it may do to one."""
    shop = workshop("int4", {"method": "gptq"})
    name = next(w.name for w in shop.manifest.weights if w.name.endswith("up_proj.weight.codes"))
    with shop.weight(name) as codes:
        codes[:] = np.roll(codes, 1, axis=0)
    result = found("weights", subjects(shop.folder))
    assert [f.where for f in result.findings] == [name]
    assert "times that of rounding to nearest, gptq allows 10" in result.findings[0].what


def test_gptq_two_rows_exchanged(workshop: Workshops, subjects: Callable[..., Any]) -> None:
    """Two rows of many move the tensor's error little, their own far."""
    shop = workshop("int8", {"method": "gptq", "lm_head": "int8", "keep_float": "none"})
    name = "lm_head.weight.codes"
    with shop.weight(name) as codes, shop.weight("lm_head.weight.scales") as scales:
        for part in (codes, scales):
            part[[290, 291]] = part[[291, 290]].copy()
    result = found("weights", subjects(shop.folder))
    assert [f.where for f in result.findings] == [name]
    assert "row 290" in result.findings[0].what


@pytest.mark.parametrize(
    ("precision", "method", "value"),
    [
        *((p, m, v) for p, m in (("int8", "rtn"), ("int4", "hqq")) for v in (1e4, float("nan"))),
        ("int4", "gptq", float("nan")),
    ],
)
def test_a_scale_that_hides_what_was_lost(
    value: float, precision: str, method: str, workshop: Workshops, subjects: Callable[..., Any]
) -> None:
    """Half a step of a huge scale would allow a row of zeros, and nothing compares with NaN."""
    shop = workshop(precision, {"method": method, "zero_points": "none", "keep_float": "none"})
    name = "model.layers.1.mlp.up_proj.weight"
    with shop.weight(f"{name}.codes") as codes, shop.weight(f"{name}.scales") as scales:
        codes[7] = 128 if precision == "int8" else 0x88
        scales[7] = value
    result = found("weights", subjects(shop.folder))
    assert [f.where for f in result.findings] == [f"{name}.codes"]


@pytest.mark.parametrize(("stored", "what"), [(0.0, []), (-0.0, ["differs in signs of zeros only"])])
def test_bit_equal_means_every_bit(
    stored: float, what: list[str], workshop: Workshops, subjects: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = workshop()
    name = "model.norm.weight"
    with shop.weight(name) as weight:
        weight[:] = stored
    subject = subjects(shop.folder)
    read = subject.baseline.tensors.read
    monkeypatch.setattr(subject.baseline.tensors, "read", lambda n: read(n) * 0 if n == name else read(n))
    assert [f.what for f in found("weights", subject).findings] == what


def test_int4_content_under_a_claimed_fp16_is_named(workshop: Workshops, subjects: Callable[..., Any]) -> None:
    from bench.defects.in_files import DEFECTS

    shop = workshop("fp16")
    next(d for d in DEFECTS if "int4" in d.name).change(shop)
    result = found("weights", subjects(shop.folder))
    assert "quantised?" in result.findings[0].what


def test_a_weight_left_over_is_named(workshop: Workshops, subjects: Callable[..., Any]) -> None:
    shop = workshop()
    extra = onnx.numpy_helper.from_array(np.ones((9, 9), np.float32), "adapter")
    shop.graphs(lambda model: model.graph.initializer.append(extra), ("decode",))
    result = found("weights", subjects(shop.folder))
    assert (result.status, result.findings[0].where) == ("FAIL", "adapter")


def test_optimums_folder_is_audited_by_content(
    workshop: Workshops, exports: Exports, subjects: Callable[..., Any]
) -> None:
    """A folder without our manifest: names mean nothing, contents do."""
    shop = workshop()
    (shop.folder / "manifest.json").unlink()
    subject = subjects(shop.folder)
    assert found("graph", subject).status == "SKIPPED"
    assert found("files", subject).status == "REPORTED"
    assert found("attributes", subject).status == "PASS"
    assert found("rotary_tables", subject).status == "PASS"
    result = found("weights", subject)
    assert result.status == "PASS", result.summary
    m = json.loads((exports() / "manifest.json").read_text())
    place = next(w for w in m["weights"] if w["name"].endswith("1.mlp.up_proj.weight"))
    data = shop.own(m["data_file"])
    array = np.memmap(data, np.float32, "r+", offset=place["offset"], shape=(4,))
    array[2] += 0.01
    array.flush()
    result = found("weights", subjects(shop.folder))
    assert result.findings[0].where == "model.layers.1.mlp.up_proj.weight"


def test_rotary_tables_beyond_the_original_context(
    workshop: Workshops, exports: Exports, subjects: Callable[..., Any]
) -> None:
    """llama3 scaling: the export passes; a table without the scaling fails, and so do the numbers out there."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    settings = {"rope_scaling": scaling, "max_position_embeddings": 512, "rope_theta": 10000.0}
    good = exports(**settings)
    subject = subjects(good, **settings)
    assert found("rotary_tables", subject).status == "PASS"
    result = found("long_context", subject)
    assert result.status == "PASS", result.summary
    assert "3 places" in result.summary
    shop = workshop(**settings)
    angles = np.arange(512)[:, None] * 10000.0 ** -(np.arange(0, 16, 2) / 16)[None]
    for name, function in (("model.rope_cos", np.cos), ("model.rope_sin", np.sin)):
        with shop.weight(name) as table:
            table[:] = function(angles)
    bad = subjects(shop.folder, **settings)
    assert found("rotary_tables", bad).findings[0].where.endswith("row 1")
    assert found("long_context", bad).status == "FAIL"


@pytest.mark.parametrize("name", ["prefill_logits", "decode_steps", "chunked_prefill", "batch_rows", "determinism"])
def test_behaviour_of_a_true_export(name: str, exports: Exports, subjects: Callable[..., Any]) -> None:
    result = found(name, subjects(exports()))
    assert result.status == "PASS", result.summary


def test_chunked_prefill_sees_positions_that_start_again(
    exports: Exports, subjects: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.probe import GraphProbe

    run = GraphProbe.run
    # Every chunk alone, as a runtime that forgets its past does.
    monkeypatch.setattr(
        GraphProbe, "run", lambda self, ids, past=None, outputs=("logits",): run(self, ids, None, outputs)
    )
    assert found("chunked_prefill", subjects(exports())).status == "FAIL"


@pytest.mark.parametrize("late", [False, True])
def test_the_first_step_after_a_prefill_counts(
    late: bool, exports: Exports, subjects: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subjects(exports())
    steps = 0
    step = subject.candidate.step

    def wrong_once(ids: list[int]) -> Any:
        nonlocal steps
        steps += 1
        logits = step(ids).copy()
        return logits[:, ::-1].copy() if steps == (13 if late else 1) else logits

    monkeypatch.setattr(subject.candidate, "step", wrong_once)
    result = found("decode_steps", subject)
    assert result.status == "FAIL"
    late_start = len(numeric._text(subject, 160)) - 25
    assert result.findings[0].where == f"step 1 after {late_start if late else 3}"


def test_the_null_control_leaves_the_baseline_as_it_was(exports: Exports, subjects: Callable[..., Any]) -> None:
    """`eager` is the same model object for a while; what is scored after it goes through the usual kernel again."""
    baseline = subjects(exports()).baseline
    config = baseline.session.model.config
    usual = config._attn_implementation
    baseline.null_score("eager", [5, 6, 7, 8])
    assert usual != "eager"
    assert config._attn_implementation == usual


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ProviderUnavailableError])
def test_what_says_nothing_about_the_folder_is_no_verdict(
    error: type[BaseException], exports: Exports, subjects: Callable[..., Any]
) -> None:
    def stop(_: Any) -> Found:
        raise error("stopped")

    with pytest.raises(error):
        Gate(subjects(exports())).result(replace(BY_NAME["files"], run=stop))


def test_a_folder_that_cannot_be_read_fails_once(workshop: Workshops, subjects: Callable[..., Any]) -> None:
    shop = workshop()
    shop.own("manifest.json").write_text("{", encoding="utf-8")
    found = validate(subjects(shop.folder), CHECKS[:4])
    assert [(r.name, r.status) for r in found.results] == [("files", "FAIL")]
    assert (found.verdict, found.tier, found.complete) == ("FAIL", "unknown", False)


def test_what_the_exact_checks_name_is_not_looked_for_in_the_layers(
    workshop: Workshops, subjects: Callable[..., Any]
) -> None:
    shop = workshop()
    shop.json("manifest.json", lambda m: m.update(vocab_size=m["vocab_size"] - 1))
    result = validate(subjects(shop.folder), [BY_NAME["manifest"]])
    assert (result.verdict, result.place) == ("FAIL", None)
    assert [n for n in result.notes if "localisation" in n] == []


def test_checks_run_in_their_own_order() -> None:
    checks = chosen_checks("tasks, mean_kld,files")
    assert [c.name for c in checks] == ["files", "mean_kld", "tasks"]


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_place_counts_where_pytorch_itself_is_not_as_far_off(
    noise: float, workshop: Workshops, subjects: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = workshop()
    name = next(w.name for w in shop.manifest.weights if w.name.endswith("layers.0.self_attn.o_proj.weight"))
    with shop.weight(name) as weight:
        weight *= 1.001
    subject = subjects(shop.folder)
    baseline = subject.baseline
    residuals, score = baseline.null_residuals, baseline.score

    def null_residuals(kind: str, ids: list[int]) -> list[dict[str, Any]]:
        off = 1 + noise if kind == "eager" else 1.0
        return [{k: v * off for k, v in layer.items()} for layer in residuals(kind, ids)]

    monkeypatch.setattr(baseline, "null_residuals", null_residuals)
    monkeypatch.setattr(baseline, "null_score", lambda kind, ids: score(ids) * (1 + noise))
    place = localize(subject)
    assert (place and (place.layer, place.operator)) == (None if noise else (0, "o_proj"))


@pytest.mark.parametrize("seed", [1, 3])
def test_rounding_that_a_softmax_makes_grow_is_no_place(
    exports: Exports, checkpoints: Exports, tiny_dataset: Any, tmp_path: Path, seed: int
) -> None:
    """A head size of 80 and sharp attention: by an absolute floor the first layer was named, whatever was wrong."""
    shape = {"hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 4, "seed": seed}
    good, checkpoint = exports(**shape), checkpoints(**shape)
    shop = Workshop(good, tmp_path / "changed", checkpoint)
    with shop.weight("model.layers.1.self_attn.o_proj.weight") as weight:
        weight *= 1.001
    shop.reseal()
    for folder, wanted in ((good, None), (shop.folder, (1, "o_proj"))):
        subject = make_subject(folder, str(checkpoint), MODES["quick"], tiny_dataset, Deployment(threads=1))
        place = localize(subject)
        subject.close()
        assert (place and (place.layer, place.operator)) == wanted


def test_a_row_that_sees_another_rows_length_is_named(
    exports: Exports, subjects: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime import host_decode
    from runtime.session import right_pad

    def row_zero(ids: Any) -> Any:
        padded, mask = right_pad(ids)
        return padded, np.repeat(mask[:1], len(mask), axis=0)

    monkeypatch.setattr(host_decode, "right_pad", row_zero)
    result = found("batch_rows", subjects(exports()))
    assert result.status == "FAIL"
    assert "row" in result.findings[0].where


def _at_multiples(subject: Any) -> None:
    """The newest token is lost whenever the text has a multiple of 64 tokens."""
    candidate, seen = subject.candidate, [0]
    prefill, step = candidate.prefill, candidate.step

    def start(ids: Any, reserve: int = 1) -> Any:
        seen[0] = len(ids[0])
        return prefill(ids, reserve)

    def go_on(ids: Any) -> Any:
        seen[0] += 1
        return step([0] * len(ids) if seen[0] % 64 == 0 else ids)

    candidate.prefill, candidate.step = start, go_on


def _long_prompts(subject: Any) -> None:
    """A prompt of over 128 tokens loses its first."""
    candidate = subject.candidate
    prefill = candidate.prefill
    candidate.prefill = lambda ids, reserve=1: prefill([row[1:] if len(row) > 128 else row for row in ids], reserve)


def _rows_above_eight(subject: Any) -> None:
    """Rows from the ninth on lose their last token."""
    candidate = subject.candidate
    prefill = candidate.prefill
    cut = lambda ids: [row[:-1] if k >= 8 and len(row) > 1 else row for k, row in enumerate(ids)]  # noqa: E731
    candidate.prefill = lambda ids, reserve=1: prefill(cut(ids), reserve + 1)


@pytest.mark.parametrize(
    ("name", "defect"),
    [("decode_steps", _at_multiples), ("prefill_logits", _long_prompts), ("batch_rows", _rows_above_eight)],
)
def test_what_goes_wrong_beyond_a_power_of_two_is_visited(
    exports: Exports, subjects: Callable[..., Any], name: str, defect: Callable[[Any], None]
) -> None:
    good, bad = (subjects(exports()) for _ in range(2))
    assert found(name, good).status == "PASS"
    defect(bad)
    assert found(name, bad).status == "FAIL"


def test_places_of_the_default_modes(exports: Exports, checkpoints: Exports) -> None:
    """Powers of two and their neighbours up to 1,025 tokens, decode across them, batches up to 17."""
    big = {"max_position_embeddings": 4096}
    for mode, longest in (("standard", 1024), ("full", 2048)):
        subject = make_subject(exports(**big), str(checkpoints(**big)), MODES[mode])
        text = list(range(7)) * 400
        subject.windows = [text]
        assert {longest - 1, longest, longest + 1, 511, 512, 513} <= set(numeric._prompts(subject))
        assert (longest - 4, 8) in numeric._starts(subject)
        assert (252, 8) in numeric._starts(subject)
        assert {len(rows) for rows in numeric._orders(subject).values()} == {2, 4, 5, 8, 9, 16, 17}
        assert numeric._cuts(subject)[1][1:3] == [longest - 3, longest + 2]


def test_a_runtime_that_is_not_deterministic_fails(
    exports: Exports, subjects: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subjects(exports())
    true_step, calls = subject.candidate.step, [0]

    def step(ids: Any) -> Any:
        calls[0] += 1
        return true_step(ids) + np.float32(1e-6) * calls[0]

    monkeypatch.setattr(subject.candidate, "step", step)
    assert found("determinism", subject).status == "FAIL"


def test_a_tokenizer_serialised_again_is_the_same(workshop: Workshops, subjects: Callable[..., Any]) -> None:
    shop = workshop()
    path = shop.own("tokenizer.json")
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert found("tokenizer", subjects(shop.folder)).status == "PASS"
    raw = json.loads(path.read_text())
    raw["added_tokens"][1]["special"] = not raw["added_tokens"][1]["special"]
    path.write_text(json.dumps(raw))
    result = found("tokenizer", subjects(shop.folder))
    assert result.findings[0].where == "tokenizer.json, added_tokens"


def test_a_tokenizer_json_that_the_export_made_is_compared_part_by_part(
    checkpoints: Callable[..., Path], sentencepiece_model: Path, tmp_path: Path
) -> None:
    from types import SimpleNamespace

    from bench.gate.checks.text import tokenizer
    from export.manifest import TOKENIZER_FILES, files_of
    from export.pipeline import export_model
    from export.source import resolve
    from export.spec import ExportSpec
    from runtime.text import load_tokenizer

    checkpoint, folder = shutil.copytree(checkpoints(), tmp_path / "checkpoint"), tmp_path / "out"
    for name in files_of(checkpoint, TOKENIZER_FILES):
        (checkpoint / name).unlink()
    shutil.copyfile(sentencepiece_model, checkpoint / "tokenizer.model")
    export_model(ExportSpec(str(checkpoint)), folder)
    read = resolve(str(checkpoint)).folder
    subject: Any = SimpleNamespace(
        folder=folder,
        sealed=True,
        tokenizer=load_tokenizer(read),
        baseline=SimpleNamespace(checkpoint=read),
        dataset=SimpleNamespace(items=[]),
    )
    assert tokenizer(subject).status == "PASS"
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["merges"][-2:] = reversed(raw["model"]["merges"][-2:])  # no text of the check shows it
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    result = tokenizer(subject)
    assert (result.status, result.findings[0].where) == ("FAIL", "tokenizer.json, model.merges")


def test_a_check_that_stops_has_failed(exports: Exports, subjects: Callable[..., Any], tmp_path: Path) -> None:
    folder = shutil.copytree(exports(), tmp_path / "cut")
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    results = validate(subjects(folder), chosen_checks("files,weights,mean_kld"), place=False)
    assert results.verdict == "FAIL"
    assert results.exit_code == 1
    assert [r.status for r in results.results] == ["FAIL"] * len(results.results)


def test_fp16_passes_its_own_tier_with_pytorchs_loss_beside_it(exports: Exports, subjects: Callable[..., Any]) -> None:
    subject = subjects(exports("fp16"))
    for name in ("mean_kld", "null_ratio"):
        result = found(name, subject)
        assert result.status in ("PASS", "SUSPICIOUS"), result.summary
        assert result.measurements[0].null_value is not None


def test_a_cache_too_short_for_the_gate_is_no_pass(exports: Exports, checkpoints: Exports) -> None:
    folder = exports(spec={"target": "tensorrt", "cache_length": 8})
    found = BY_NAME["graph"].run(make_subject(folder, str(checkpoints()), MODES["quick"]))
    assert (found.status, found.findings[0].where) == ("INCONCLUSIVE", "manifest.json, kv.cache_length")


def test_a_cache_length_that_the_graph_has_not_is_named(
    exports: Callable[..., Path], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(exports(spec={"target": "tensorrt"}), tmp_path / "folder")
    raw = json.loads((folder / "manifest.json").read_text())
    raw["kv"]["cache_length"] = 80
    (folder / "manifest.json").write_text(json.dumps(raw))
    found = BY_NAME["manifest"].run(make_subject(folder, str(checkpoints()), MODES["quick"]))
    assert [f.what for f in found.findings] == ["says 80, the baseline demands 160"]


def test_a_graph_of_the_older_form_says_that_it_has_to_be_exported_again(
    exports: Callable[..., Path], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(exports(spec={"target": "tensorrt"}), folder)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["kv"] = {k: v for k, v in raw["kv"].items() if k != "cache_length"} | {"shared_buffer": False}
    (folder / "manifest.json").write_text(json.dumps(raw))
    found = BY_NAME["graph"].run(make_subject(folder, str(checkpoints()), MODES["quick"]))
    assert found.status == "FAIL"
    assert "older version of this tool exported it; export it again" in found.summary


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("weight", "wanted"),
    [
        ("model.layers.1.self_attn.o_proj.weight", (1, "o_proj")),
        ("model.layers.1.self_attn.qkv_proj.weight", (1, "qkv")),
        ("model.layers.0.mlp.down_proj.weight", (0, "output")),
        ("lm_head.weight", (2, "head")),
        ("model.rope_cos", (0, "attention")),
    ],
)
def test_a_place_in_a_graph_of_standard_operators(
    biased: bool,
    weight: str,
    wanted: tuple[int, str],
    exports: Exports,
    checkpoints: Exports,
    tiny_dataset: Any,
    tmp_path: Path,
) -> None:
    shape: dict[str, Any] = {"attention_bias": True} if biased else {}
    checkpoint = checkpoints(**shape)
    shop = Workshop(exports(spec={"target": "tensorrt"}, **shape), tmp_path / "changed", checkpoint)
    with shop.weight(weight) as values:
        values *= 1.01
    shop.reseal()
    subject = make_subject(shop.folder, str(checkpoint), MODES["quick"], tiny_dataset, Deployment(threads=1))
    place = localize(subject)
    subject.close()
    assert place
    assert (place.layer, place.operator) == wanted
