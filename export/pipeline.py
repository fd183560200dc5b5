"""Convert -> write -> check -> publish, all or nothing.

A folder appears under its name only when every file in it is complete and hashed. Killed halfway, nothing is left
under OUT. Try: ``llama-onnx export demo /tmp/demo-onnx``.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from export.architectures import ARCHITECTURES, architecture_of
from export.cache import publish, require_space
from export.check import check_graph
from export.convert import EMBEDDING, OPSET, ROPE, TORCH_DTYPE, Conversion, cache_length_of, convert, kept_windows
from export.errors import BrokenCheckpointError, DestinationError, UnsupportedModelError
from export.genai import genai_config
from export.manifest import (
    CHAT_TEMPLATES,
    DECODE_GRAPH,
    GENAI_CONFIG,
    SCHEMA_VERSION,
    SCORING_GRAPH,
    SIDE_FILES,
    VOCABULARIES,
    FileEntry,
    KVLayout,
    Manifest,
    ManifestError,
    Quantisation,
    Weight,
    files_of,
    first_line,
    read_manifest,
    sha256_of,
    write_manifest,
)
from export.oldest_runtime import oldest_runtime
from export.plain import run_optimum, weights_of
from export.quantize import Packed
from export.sizes import NO_CONTEXT, context_length, head_dim_of, kv_heads_of, stated_context
from export.source import Source, resolve
from export.spec import BITS, ExportSpec
from export.spelling import rope_of
from export.tensorrt_ops import PARSER_VERSION
from export.weights import Checkpoint, Quantiser, check_names, write_data

DATA_FILE = "model.onnx.data"
_TOOLS = ("llama-onnx-bench", "torch", "transformers", "optimum", "optimum-onnx", "onnx", "safetensors")
Progress = Callable[[int, int], None]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def load_config(source: Source) -> PretrainedConfig:
    """The checkpoint's transformers configuration.

    Raises:
        BrokenCheckpointError: transformers does not know the architecture or cannot read the file.
    """
    try:
        with redirect_stdout(io.StringIO()):  # it prints what it cannot use
            config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # whatever its classes stumble over
        if "trust_remote_code" in str(e):
            raise UnsupportedModelError(
                f"{source.folder} brings Python code of its own, which is never run; only models that transformers "
                "itself knows are exported"
            ) from None
        raise BrokenCheckpointError(f"{source.folder}/config.json cannot be used: {first_line(e)}") from None
    if not isinstance(config, PretrainedConfig):
        raise BrokenCheckpointError(f"{source.folder}/config.json cannot be used: it describes no model")
    config.return_dict = True  # how a program wants its outputs is no part of the model
    if config.model_type in ARCHITECTURES:
        _check_numbers(config, f"{source.folder}/config.json")
    return config


_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def _check_numbers(config: PretrainedConfig, where: str) -> None:
    """Refuse sizes that are none, before they become a graph."""

    def refuse(key: str, value: Any, wanted: str) -> BrokenCheckpointError:
        said = f"{where}: {key} is {str(value)[:40]}, not {wanted}"
        return BrokenCheckpointError(f"{said}; copy or download the file again")

    for key in _COUNTS + (("head_dim",) if getattr(config, "head_dim", None) is not None else ()):
        value = getattr(config, key, None)
        if type(value) is not int or value < 1:
            raise refuse(key, value, "a whole number above 0")
    rope = rope_of(config)
    for key, value in (("rms_norm_eps", config.rms_norm_eps), ("rope_theta", rope.pop("rope_theta"))):
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise refuse(key, value, "a number above 0")
    if any(not isinstance(v, int | float | list | None) for k, v in rope.items() if k != "rope_type"):
        raise refuse("rope_scaling", rope, "numbers by name")
    pad, vocab = config.pad_token_id, config.vocab_size
    if pad is not None and (type(pad) is not int or not -vocab <= pad < vocab):
        raise BrokenCheckpointError(
            f"{where}: pad_token_id is {str(pad)[:40]}, which no row of the embedding has (vocab_size {vocab}), so "
            "transformers cannot load the model; set it to null or to the end token's id"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        wanted = f"a divisor of {config.num_attention_heads} heads"
        raise refuse("num_key_value_heads", config.num_key_value_heads, wanted)
    if rope["partial_rotary_factor"] not in (None, 1, 1.0):
        name = ARCHITECTURES[config.model_type].name
        raise UnsupportedModelError(f"{where}: partial_rotary_factor rotates part of a head; {name} rotates all of it")


def eos_ids(folder: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """End-of-sequence token ids: generation_config.json decides before config.json, as in transformers."""
    value: Any = config.eos_token_id
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", value)
        except (ValueError, AttributeError, RecursionError) as e:
            raise BrokenCheckpointError(f"{path} is not a JSON object ({e}); copy it again") from None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(v) is not int or v < 0 for v in ids):
        raise BrokenCheckpointError(f"{folder}: eos_token_id is {str(value)[:40]}, not token ids; copy the files again")
    return tuple(ids)


def _check_destination(out: Path, spec: ExportSpec, force: bool) -> Manifest | None:
    """The manifest of an equal export that is already there, None when OUT is free; an error otherwise."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir():
        raise DestinationError(f"{out} exists and is a file; choose another OUT")
    try:
        manifest = read_manifest(out)
    except ManifestError:
        raise DestinationError(
            f"{out} exists and is not an export of ours; nothing was changed, choose another OUT"
        ) from None
    if force:
        return None
    if manifest.spec_digest == spec.digest:
        return manifest
    asked = manifest.spec
    raise DestinationError(
        f"{out} holds another export ({asked.get('model')}, {asked.get('precision')}, {asked.get('target')}); "
        f"choose another OUT, or replace it with --force"
    )


def export_model(
    spec: ExportSpec,
    out: Path,
    *,
    force: bool = False,
    source: Source | None = None,
    calibration: Sequence[str] = (),
    allow_pickle: bool = False,
    status: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> tuple[Manifest, bool]:
    """Export a checkpoint to ``out``.

    Args:
        spec: what to make.
        out: the folder to appear. An equal export that is there already is kept.
        force: replace another export of ours (never anything else).
        source: a checkpoint that was resolved before; by default ``spec.model`` is resolved.
        calibration: texts whose activations ``gptq`` is calibrated on.
        allow_pickle: see :func:`export.source.resolve`.
        status: told what is being done.
        progress: told (bytes written, bytes in all).

    Returns:
        The manifest, and whether something was written (False: an equal export was there).

    Raises:
        ExportError: see :mod:`export.errors`.
    """
    out = out.expanduser()
    out = out.resolve() if out.is_symlink() or ".." in out.parts else out  # a link stays one
    existing = _check_destination(out, spec, force)
    source = source or resolve(spec.model, spec.revision, status, allow_pickle)
    if existing is not None:
        if existing.source_key == source.content_key:
            return existing, False
        raise DestinationError(
            f"{out} holds an export of {spec.model} as it was before its files changed; "
            f"replace it with --force, or choose another OUT"
        )
    export = _Export(spec, source, load_config(source), Checkpoint(source.folder), out, calibration, status, progress)
    return export.plain() if spec.target == "plain" else export.fused(), True


@dataclass(frozen=True)
class _Export:
    """One export under way; see :func:`export_model`."""

    spec: ExportSpec
    source: Source
    config: PretrainedConfig
    checkpoint: Checkpoint
    out: Path
    calibration: Sequence[str]
    status: Callable[[str], None]
    progress: Progress

    def fused(self) -> Manifest:
        """Our own graphs over streamed weights."""
        spec, config = self.spec, self.config
        self.status("tracing the graph")
        conversion = convert(config, spec, DATA_FILE)
        check_names(conversion, self.checkpoint, architecture_of(config).class_name, config.tie_word_embeddings)
        require_space(self.out, conversion.data_bytes, "the export")
        counts = check_graph(conversion.decode, config, spec)
        check_graph(conversion.scoring, config, spec)
        quantiser = self._quantiser()
        self.status("writing the weights")
        with publish(self.out, replace=True) as work:
            data_sha, identity = write_data(conversion, self.checkpoint, work / DATA_FILE, self.progress, quantiser)
            onnx.save_model(conversion.decode, work / DECODE_GRAPH)
            onnx.save_model(conversion.scoring, work / SCORING_GRAPH)
            facts = _facts(spec, config, conversion, counts)
            if spec.attention == "GroupQueryAttention":
                eos = eos_ids(self.source.folder, config)
                described = genai_config(config, DECODE_GRAPH, eos, facts["oldest_runtime"])
                (work / GENAI_CONFIG).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
            return self._sealed(work, identity, {DATA_FILE: data_sha}, facts)

    def plain(self) -> Manifest:
        """optimum's graph."""
        weights = sum(f.stat().st_size for f in self.source.folder.glob("*.safetensors"))
        require_space(self.out, 2 * weights, "the export")
        with publish(self.out, replace=True) as work:
            graph = run_optimum(self.spec, self.source.folder, self.config, work, self.status)
            identity, parameters = weights_of(self.checkpoint)
            limit = () if stated_context(self.config) else (NO_CONTEXT,)
            facts = {
                **graph,
                "parameters": parameters,
                "quantisation": None,
                "padding": "any",
                "decode_logits": "all",
                "decode_graph": DECODE_GRAPH,
                "scoring_graph": DECODE_GRAPH,
                "weights": (),
                "notes": ("optimum's own graph, unchanged: nothing is fused", *limit),
            }
            return self._sealed(work, identity, {}, facts)

    def _sealed(self, work: Path, identity: str, known: dict[str, str], facts: dict[str, Any]) -> Manifest:
        """Copy what belongs to the model, hash everything and write the manifest.

        Args:
            work: the folder in the making.
            identity: of the checkpoint's weights.
            known: SHA-256 by name of files that need not be hashed again.
            facts: the manifest's fields that depend on how the graph was made.
        """
        spec, source, config = self.spec, self.source, self.config
        _copy_side_files(source.folder, work)
        if note := _complete_tokenizer(source.folder, work):
            self.status(note)
            facts["notes"] += (note,)
        self.status("hashing")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            spec=asdict(spec),
            spec_digest=spec.digest,
            model_name=source.name,
            model_type=config.model_type,
            weights_sha256=identity,
            weights_origin=source.origin,
            source_key=source.content_key,
            precision=spec.precision,
            activations=spec.float_type,
            target=spec.target,
            attention=spec.attention,
            vocab_size=config.vocab_size,
            context_length=context_length(config),
            eos_token_ids=eos_ids(source.folder, config),
            versions={name: _version(name) for name in _TOOLS},
            files={
                name: FileEntry((work / name).stat().st_size, known.get(name) or sha256_of(work / name))
                for name in files_of(work, ("**/*",))
            },
            **facts,
        )
        write_manifest(work, manifest)
        return manifest

    def _quantiser(self) -> Quantiser | None:
        """What turns a float weight into a packed one under this specification; None where nothing is quantised."""
        spec = self.spec
        if spec.precision not in BITS:
            return None
        from export.quantize import quantize

        hessians: dict[str, Tensor] = {}
        if spec.method == "gptq":
            from export.calibrate import hessians_of

            hessians = hessians_of(self.source.folder, self.calibration, self.status)

        def apply(recipe: Weight, weight: Tensor) -> Packed:
            # The embedding is looked up, not multiplied: it has no activations to calibrate on.
            method = "rtn" if recipe.name.startswith(EMBEDDING) and spec.method == "gptq" else str(spec.method)
            return quantize(
                weight,
                recipe.bits,
                spec.block,
                method,
                hessian=hessians.get(recipe.sources[0]) if method == "gptq" else None,
                scale_dtype=TORCH_DTYPE[spec.float_type],
                float_zero=spec.float_zero(recipe.bits),
                symmetric=spec.symmetric,
                positive=spec.standard,
            )

        return apply


def _copy_side_files(folder: Path, work: Path) -> None:
    for name in files_of(folder, SIDE_FILES):
        if name.endswith(".json"):  # a link may lead to any file
            try:
                json.loads((folder / name).read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as e:
                raise BrokenCheckpointError(f"{folder / name} is not valid JSON ({e}); copy it again") from None
        (work / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, work / name)


def _complete_tokenizer(folder: Path, work: Path) -> str | None:
    """Make a copied tokenizer one that onnxruntime-genai reads as transformers does; why not where that fails.

    It knows ``tokenizer.json`` only, and takes a chat template in tokenizer_config.json before chat_template.jinja.
    """
    settings = work / "tokenizer_config.json"
    if files_of(work, VOCABULARIES) and not ((work / "tokenizer.json").is_file() and settings.is_file()):
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as e:  # transformers raises whatever its converters stumble over
            return f"the tokenizer was copied, but cannot be loaded here: {first_line(e)}"
        with tempfile.TemporaryDirectory(prefix="llama-onnx-tokenizer-") as saved:
            tokenizer.save_pretrained(saved)
            for name in ("tokenizer.json", settings.name):
                if (Path(saved) / name).is_file() and not (work / name).exists():
                    shutil.copyfile(Path(saved) / name, work / name)
            if settings.is_file() and (Path(saved) / settings.name).is_file():
                own, made = (json.loads((at / settings.name).read_text(encoding="utf-8")) for at in (work, Path(saved)))
                named = {k: v for k, v in made.items() if k.endswith("_token")}  # genai does not know a class's own
                if isinstance(own, dict) and named.keys() - own.keys():
                    text = json.dumps(named | own, indent=2, ensure_ascii=False)
                    settings.write_text(text + "\n", encoding="utf-8")
    if settings.is_file() and files_of(work, CHAT_TEMPLATES):
        raw = json.loads(settings.read_text(encoding="utf-8"))
        if isinstance(raw, dict) and raw.pop("chat_template", None) is not None:
            settings.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return None


def _facts(
    spec: ExportSpec, config: PretrainedConfig, conversion: Conversion, counts: dict[str, int]
) -> dict[str, Any]:
    """The manifest's fields about our own graphs."""
    gqa = spec.attention == "GroupQueryAttention"
    # Not read whole in a decode step: the embedding gathers one row, the rotary tables too.
    skipped = (EMBEDDING, *ROPE)
    quantisation = None
    notes = []
    if spec.precision in BITS:
        quantisation = Quantisation(
            weights=spec.precision,
            method=str(spec.method),
            block_size=spec.block,
            accuracy_level=spec.accuracy_level or 0,
            zero_points=str(spec.zero_points),
            keep_float=str(spec.keep_float),
            lm_head=str(spec.lm_head),
            embedding=str(spec.embedding),
        )
    if spec.target == "ort" and not gqa:
        notes.append("CUDA has no GroupQueryAttention for fp32: standard operators of opset 24 instead")
    if not gqa:
        notes.append(f"operators checked against the list of TensorRT's parser {PARSER_VERSION}")
    if rope_of(config)["rope_type"] == "dynamic":
        notes.append("dynamic rope scaling: exact up to the original context, longer prompts are refused")
    used = {s for recipe in conversion.recipes for s in recipe.sources}
    graph = conversion.decode.graph
    oldest, because = oldest_runtime(conversion.decode, conversion.scoring)
    return {
        "parameters": sum(math.prod(conversion.shapes[s]) for s in used),
        "quantisation": quantisation,
        "padding": "right" if gqa else "any",
        "decode_logits": "last",
        "opset": OPSET[spec.attention],
        "decode_graph": DECODE_GRAPH,
        "scoring_graph": SCORING_GRAPH,
        "data_file": DATA_FILE,
        "inputs": tuple(i.name for i in graph.input),
        "outputs": tuple(o.name for o in graph.output),
        "kv": KVLayout(
            layers=config.num_hidden_layers,
            kv_heads=kv_heads_of(config),
            head_dim=head_dim_of(config),
            dtype=spec.float_type,
            shared_buffer=True,
            cache_length=None if gqa else cache_length_of(config, spec),
            windows=kept_windows(config, spec),
        ),
        "fused_ops": counts,
        "node_count": len(graph.node),
        "decode_weight_bytes": sum(r.nbytes for r in conversion.recipes if not r.name.startswith(skipped)),
        "weights": conversion.recipes,
        "notes": tuple(notes),
        "oldest_runtime": oldest,
        "oldest_because": because,
    }
