"""Publishing: all or nothing, and what stands in the manifest."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from export.check import check_graph
from export.convert import convert
from export.errors import DestinationError, GraphCheckError
from export.manifest import ManifestError, read_manifest, verify_files
from export.pipeline import export_model, load_config
from export.source import resolve
from export.spec import ExportSpec

Exports = Callable[..., Path]
Checkpoints = Callable[..., Path]


def test_manifest_tells_the_truth(exports: Exports, checkpoints: Checkpoints) -> None:
    folder = exports()
    manifest = read_manifest(folder)
    on_disk = {p.name for p in folder.iterdir()} - {"manifest.json"}
    assert set(manifest.files) == on_disk
    for name, entry in manifest.files.items():
        content = (folder / name).read_bytes()
        assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest.fused_ops == {
        "GroupQueryAttention": 2,
        "SimplifiedLayerNormalization": 1,
        "SkipSimplifiedLayerNormalization": 4,
        "MatMul": 11,
    }
    graph = onnx.load(folder / manifest.decode_graph, load_external_data=False).graph
    assert manifest.node_count == len(graph.node)
    assert manifest.inputs == tuple(i.name for i in graph.input)
    assert manifest.kv.bytes_per_token() == 2 * 2 * 2 * 16 * 4
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoints())
    assert manifest.parameters == sum(p.numel() for p in model.parameters())
    read = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    assert manifest.decode_weight_bytes == 4 * read


def test_weights_are_where_the_manifest_says(exports: Exports, checkpoints: Checkpoints) -> None:
    from safetensors.numpy import load_file

    folder = exports()
    manifest = read_manifest(folder)
    data = (folder / manifest.data_file).read_bytes()
    tensors = load_file(checkpoints() / "model.safetensors")
    seen = set()
    for weight in manifest.weights:
        if not weight.sources:
            continue
        joined = np.concatenate([tensors[s] for s in weight.sources])
        want = joined.T if "transpose" in weight.transform else joined
        have = np.frombuffer(data, np.float32, int(np.prod(weight.shape)), weight.offset).reshape(weight.shape)
        np.testing.assert_array_equal(have, want)
        assert weight.offset % 4096 == 0
        seen.update(weight.sources)
    assert seen == set(tensors)


def test_identity_does_not_depend_on_shards(exports: Exports) -> None:
    assert read_manifest(exports()).weights_sha256 == read_manifest(exports(shards="60KB")).weights_sha256
    assert read_manifest(exports()).weights_sha256 != read_manifest(exports(seed=1)).weights_sha256


def test_an_equal_export_is_kept_and_another_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spec = ExportSpec(str(checkpoints()))
    _, written = export_model(spec, out)
    assert written
    before = (out / "model.onnx.data").stat().st_mtime_ns
    _, written = export_model(spec, out)
    assert not written
    assert (out / "model.onnx.data").stat().st_mtime_ns == before
    other = ExportSpec(str(checkpoints()), "fp16")
    with pytest.raises(DestinationError, match="--force"):
        export_model(other, out)
    manifest, written = export_model(other, out, force=True)
    assert written
    assert manifest.precision == "fp16"
    assert read_manifest(out).precision == "fp16"


def test_a_checkpoint_that_changed_is_not_called_up_to_date(checkpoints: Checkpoints, tmp_path: Path) -> None:
    import shutil

    checkpoint = shutil.copytree(checkpoints(), tmp_path / "checkpoint")
    spec = ExportSpec(str(checkpoint))
    first, _ = export_model(spec, tmp_path / "out")
    shutil.copyfile(checkpoints(seed=1) / "model.safetensors", checkpoint / "model.safetensors")
    with pytest.raises(DestinationError, match="before its files changed"):
        export_model(spec, tmp_path / "out")
    second, _ = export_model(spec, tmp_path / "out", force=True)
    assert second.weights_sha256 != first.weights_sha256


def test_two_processes_may_fill_the_cache_at_once(tmp_path: Path) -> None:
    from export.cache import publish

    target = tmp_path / "cached"
    with publish(target, shared=True) as work:
        (work / "file").write_text("mine")
        target.mkdir()
        (target / "file").write_text("the other's")
    assert (target / "file").read_text() == "the other's"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("force", [False, True])
def test_out_that_is_something_else_is_left_alone(checkpoints: Checkpoints, tmp_path: Path, force: bool) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(DestinationError, match="not an export of ours"):
        export_model(ExportSpec(str(checkpoints())), out, force=force)
    assert (out / "thesis.txt").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(DestinationError, match="is a file"):
        export_model(ExportSpec(str(checkpoints())), file, force=force)
    assert file.read_text() == "x"


def test_full_disk_is_noticed_before_anything_is_written(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(DestinationError, match="GB free"):
        export_model(ExportSpec(str(checkpoints())), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_killed_halfway_leaves_nothing_and_the_next_run_succeeds(checkpoints: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Stops for good after the first bytes of weights, as a process does that is about to be killed.
    code = (
        "import sys, time; from pathlib import Path; from export.pipeline import export_model; "
        "from export.spec import ExportSpec; "
        "f = lambda done, total: (print('writing', flush=True), time.sleep(600)); "
        f"export_model(ExportSpec({str(checkpoints())!r}), Path({str(out)!r}), progress=f)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not out.exists()
    assert list(tmp_path.glob(".out.partial-*"))
    export_model(ExportSpec(str(checkpoints())), out)
    verify_files(out, read_manifest(out))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_while_writing_leaves_nothing(checkpoints: Checkpoints, tmp_path: Path) -> None:
    def fail(*_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        export_model(ExportSpec(str(checkpoints())), tmp_path / "out", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_partial_folder_of_a_living_process_is_left(checkpoints: Checkpoints, tmp_path: Path) -> None:
    alive = tmp_path / f".out.partial-{os.getppid()}"
    alive.mkdir()
    export_model(ExportSpec(str(checkpoints())), tmp_path / "out")
    assert alive.is_dir()


@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "tokenizer.json"])
def test_a_changed_byte_is_found(name: str, exports: Exports, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(exports(), tmp_path / "copy")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ManifestError, match=rf"SHA-256 of {name} is not the manifest's"):
        verify_files(folder, read_manifest(folder))


def test_broken_manifests(exports: Exports, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(ManifestError, match="no exported folder"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "plain").mkdir()
    with pytest.raises(ManifestError, match="not an export of ours"):
        read_manifest(tmp_path / "plain")
    folder = shutil.copytree(exports(), tmp_path / "copy")
    raw = json.loads((folder / "manifest.json").read_text())

    def rewrite(**changes: object) -> None:
        (folder / "manifest.json").write_text(json.dumps(raw | changes))

    rewrite(schema_version=99)
    with pytest.raises(ManifestError, match="schema version 99"):
        read_manifest(folder)
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "kv"}))
    with pytest.raises(ManifestError, match="lacks kv"):
        read_manifest(folder)
    rewrite(files={"../escape": {"size": 1, "sha256": "x"}})
    with pytest.raises(ManifestError, match="not among the files"):
        read_manifest(folder)
    rewrite(files=raw["files"] | {"../escape": {"size": 1, "sha256": "x"}})
    with pytest.raises(ManifestError, match="not a plain file name"):
        verify_files(folder, read_manifest(folder))
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match="not valid JSON"):
        read_manifest(folder)


def test_check_finds_what_is_not_fused(checkpoints: Checkpoints) -> None:
    config = load_config(resolve(str(checkpoints())))

    spec = ExportSpec("x")

    def fresh() -> onnx.ModelProto:
        return convert(config, spec, "data").decode

    def find(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
        return next(n for n in model.graph.node if n.op_type == op)

    check_graph(fresh(), config, spec)
    lost = fresh()
    lost.graph.node.remove(find(lost, "GroupQueryAttention"))
    with pytest.raises(GraphCheckError, match="1 GroupQueryAttention where the config demands 2"):
        check_graph(lost, config, spec)
    softmax = fresh()
    softmax.graph.node.append(helper.make_node("Softmax", ["x"], ["y"]))
    with pytest.raises(GraphCheckError, match="1 Softmax left over"):
        check_graph(softmax, config, spec)
    for op, name, value, words in (
        ("GroupQueryAttention", "rotary_interleaved", 1, "rotary_interleaved is 1"),
        ("GroupQueryAttention", "scale", 0.26, "scale is"),
        ("SkipSimplifiedLayerNormalization", "epsilon", 1e-3, "epsilon is"),
    ):
        model = fresh()
        node = find(model, op)
        node.attribute.remove(next(a for a in node.attribute if a.name == name))
        node.attribute.append(helper.make_attribute(name, value))
        with pytest.raises(GraphCheckError, match=words):
            check_graph(model, config, spec)


@pytest.mark.slow
def test_demo_export_is_small_and_light(demo_checkpoint: Path, tmp_path: Path) -> None:
    """At most 350 nodes, under 1.5 GB peak; the time is printed by `llama-onnx export`, not tested."""
    code = (
        "from pathlib import Path; from export.pipeline import export_model; from export.spec import ExportSpec; "
        f"m, _ = export_model(ExportSpec('demo'), Path({str(tmp_path / 'out')!r})); "
        "peak = [x for x in open('/proc/self/status') if x.startswith('VmHWM')][0].split()[1]; "
        "print(m.node_count, m.fused_ops['GroupQueryAttention'], peak)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    nodes, attentions, peak = map(int, done.stdout.split())
    print(f"export of the demo model: {time.perf_counter() - started:.1f} s with imports, peak {peak / 1e6:.2f} GB")
    assert nodes <= 350
    assert attentions == 30
    assert peak * 1024 < 1.5e9
