"""Providers on faked lists and sessions: options, causes, placement, fallbacks."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_inference_collection

from bench.cli.main import main
from export import TELEMETRY_OFF
from runtime import doctor, providers
from runtime.errors import ProviderUnavailableError, SessionError
from runtime.loading import load
from runtime.provider_options import options_of, parse_options
from runtime.providers import PROVIDERS, Placement, placement, require, require_active, require_placed

Get = Callable[..., Path]


def test_options_are_text_and_more_wins() -> None:
    assert options_of("cuda", {"use_tf32": "1", "anything": "x"}) == {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "do_copy_in_default_stream": "1",
        "use_tf32": "1",
        "enable_cuda_graph": "0",
        "anything": "x",
    }
    found = options_of("tensorrt", {"trt_engine_cache_path": "cache"})
    assert found["trt_layer_norm_fp32_fallback"] == "1"
    assert found["trt_engine_cache_path"] == "cache"
    assert "trt_profile_min_shapes" not in found
    assert options_of("tensorrt-rtx") == {"device_id": "0", "enable_cuda_graph": "0"}


def test_option_texts() -> None:
    assert parse_options(["a=1", "b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    for bad, words in ((["a"], "not of the form"), (["=1"], "not of the form"), (["a=1", "a=2"], "given twice")):
        with pytest.raises(SessionError, match=words):
            parse_options(bad)


def test_the_cpu_has_no_options(exports: Get) -> None:
    with pytest.raises(SessionError, match="has no options and would ignore nope"):
        load(exports(), provider_options={"nope": "1"})


def test_options_reach_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    listed = providers.provider_list(PROVIDERS["cuda"], {"device_id": "1"})
    assert listed == [("CUDAExecutionProvider", {"device_id": "1"}), "CPUExecutionProvider"]
    trt = providers.provider_list(PROVIDERS["tensorrt"])
    assert [p if isinstance(p, str) else p[0] for p in trt] == [
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]
    assert trt[0][1]["trt_layer_norm_fp32_fallback"] == "1"


def test_what_does_not_load_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """onnxruntime's own lines would stand in the JSON on standard output, and 30 of them before our one."""
    severities: list[int] = []
    monkeypatch.setattr(ort, "set_default_logger_severity", severities.append)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcublasLt.so.13"))
    for once in (providers._silence, providers._preload):
        once.cache_clear()
    try:
        require("cpu", None)
        assert severities == []
        for _ in range(2):
            providers.provider_list(require("cuda", None))
        assert severities == [4]
        vars(onnxruntime_inference_collection)["print"]("*************** EP Error ***************")
    finally:
        for once in (providers._silence, providers._preload):
            once.cache_clear()
    assert capsys.readouterr() == ("", "")


def fake_session(*names: str, nodes: dict[str, list[str]] | None = None) -> Any:
    parts = [
        SimpleNamespace(ep_name=ep, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops])
        for ep, ops in (nodes or {}).items()
    ]
    return SimpleNamespace(get_providers=lambda: list(names), get_provider_graph_assignment_info=lambda: parts)


def test_a_fallback_names_the_library_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"")
    monkeypatch.setattr(providers.ort, "__file__", str(tmp_path / "__init__.py"))

    def refuse(_path: str) -> None:
        raise OSError("libcudnn.so.9: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    fallen = fake_session("CPUExecutionProvider")
    with pytest.raises(ProviderUnavailableError) as error:
        require_active(fallen, PROVIDERS["cuda"])
    said = str(error.value)
    assert "libonnxruntime_providers_cuda.so needs libcudnn.so.9" in said
    assert f"onnxruntime {ort.__version__}" in said  # what was found
    assert "pip install 'onnxruntime-gpu" in said
    assert error.value.exit_code == 4
    line = require_active(fallen, PROVIDERS["cuda"], allow_fallback=True)
    assert line is not None
    assert "libcudnn.so.9" in line
    assert require_active(fake_session("CUDAExecutionProvider"), PROVIDERS["cuda"]) is None


@pytest.mark.parametrize("op", ["TensorScatter", "DequantizeLinear"])
def test_a_cache_that_goes_to_the_host_is_an_error(op: str) -> None:
    """Each step would move the whole cache, or the weights, between the GPU and the host."""
    nodes = {"CUDAExecutionProvider": ["MatMul"], "CPUExecutionProvider": [op]}
    found = placement(fake_session("CUDAExecutionProvider", nodes=nodes))
    with pytest.raises(ProviderUnavailableError, match=f"{op} on the CPU"):
        require_placed(found, PROVIDERS["cuda"], allow_fallback=False)


def test_nodes_elsewhere_are_an_error() -> None:
    cuda = PROVIDERS["cuda"]
    session = fake_session(
        "CUDAExecutionProvider",
        nodes={"CUDAExecutionProvider": ["MatMul"] * 3, "CPUExecutionProvider": ["Shape", "GroupQueryAttention"]},
    )
    found = placement(session)
    assert found.nodes == {"CUDAExecutionProvider": 3, "CPUExecutionProvider": 2}
    assert found.attention == {"CPUExecutionProvider": "GroupQueryAttention"}
    assert found.work_on_cpu == {"GroupQueryAttention"}  # a Shape may be on the CPU
    with pytest.raises(ProviderUnavailableError, match="GroupQueryAttention on the CPU") as error:
        require_placed(found, cuda, allow_fallback=False)
    assert error.value.exit_code == 4
    assert "GroupQueryAttention" in str(require_placed(found, cuda, allow_fallback=True))
    assert (
        require_placed(found, PROVIDERS["cpu"], allow_fallback=True)
        == "not everything runs on cpu: 3 nodes on CUDAExecutionProvider"
    )
    other = Placement({"CPUExecutionProvider": 5, "DmlExecutionProvider": 1}, {})
    with pytest.raises(ProviderUnavailableError, match="1 nodes on DmlExecutionProvider"):
        require_placed(other, PROVIDERS["cpu"], allow_fallback=False)
    mixed = Placement({"TensorrtExecutionProvider": 1, "CUDAExecutionProvider": 4}, {})
    assert require_placed(mixed, PROVIDERS["tensorrt"], allow_fallback=False) is None


def test_placement_and_attention_are_in_the_record(session: Any) -> None:
    details = session.info.details
    assert details["attention"] == "GroupQueryAttention on CPUExecutionProvider"
    nodes, _, where = details["nodes"].partition(" on ")
    assert int(nodes) > 10
    assert where == "CPUExecutionProvider"
    assert "fallback" not in details


def test_allow_fallback_is_a_line_in_the_record(exports: Get) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("CUDA is here: nothing to fall back from")
    with load(exports(), "cuda", threads=1, allow_fallback=True) as opened:
        assert opened.info.provider == "cpu"
        assert "provider 'cuda' is not installed" in str(opened.info.details["fallback"])
        assert opened.prefill([[1, 2]]).shape == (1, 331)


def test_the_plugin_is_found_by_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "libonnxruntime_providers_nv_tensorrt_rtx.so"
    library.write_bytes(b"not a library")
    fake = SimpleNamespace(
        metadata={"Name": "onnxruntime_ep_nv_tensorrt_rtx-cu13"},
        version="1.0",
        files=[Path("readme.txt"), Path(library.name)],
        locate_file=lambda f: tmp_path / f,
    )
    rtx = PROVIDERS["tensorrt-rtx"]
    with pytest.raises(ProviderUnavailableError, match="pip install onnxruntime-ep-nv-tensorrt-rtx-cu13"):
        providers.require("tensorrt-rtx", None)
    monkeypatch.setattr(providers.importlib.metadata, "distributions", lambda: [fake])
    assert providers.plugin_library(rtx.plugin) == library
    with pytest.raises(ProviderUnavailableError, match=r"does not load.*cu13 1\.0"):
        providers.require("tensorrt-rtx", None)


def test_doctor_page_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--no-bandwidth"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f["provider"] for f in found["providers"]] == ["cpu", "cuda", "tensorrt", "tensorrt-rtx"]
    assert found["providers"][0]["loads"] is True
    assert found["cpu"]["cores"] >= 1
    assert found["telemetry"] == {name: os.environ[name] for name in TELEMETRY_OFF}
    assert "onnxruntime" in " ".join(found["packages"])
    assert main(["doctor", "--no-bandwidth"]) == 0
    page = capsys.readouterr().out
    if not found["providers"][1]["loads"]:
        assert "pip install 'onnxruntime-gpu[cuda,cudnn]'  # cuda" in page
        assert found["gpu"]["missing"] or found["gpu"]["devices"]


def test_gpu_facts_from_a_faked_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetCudaDriverVersion_v2=lambda: 13010,
        nvmlSystemGetDriverVersion=lambda: b"580.1",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetName=lambda h: "GPU X",
        nvmlDeviceGetMemoryInfo=lambda h: SimpleNamespace(total=80 << 30),
        nvmlDeviceGetClockInfo=lambda h, kind: 100 * kind,
        nvmlDeviceGetMaxClockInfo=lambda h, kind: 1000 * kind,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = doctor.gpus()
    assert (found.driver, found.cuda_driver) == ("580.1", "13.1")
    assert found.devices[0]["memory_clock_max_mhz"] == 2000

    def no_driver() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    nvml.nvmlInit = no_driver
    assert "Not Found" in doctor.gpus().missing


def test_a_graph_that_is_run_once_does_not_fall_back_unsaid(monkeypatch, tmp_path):
    from runtime import probe
    from runtime.settings import SessionSettings

    class Elsewhere:
        def __init__(self, *_, **__): ...

        def get_providers(self):
            return ["AzureExecutionProvider"]

    monkeypatch.setattr(probe.ort, "InferenceSession", Elsewhere)
    with pytest.raises(ProviderUnavailableError, match="'cpu' was asked for, but the session runs on Azure"):
        probe.run_once(tmp_path / "x.onnx", {}, [], SessionSettings())
