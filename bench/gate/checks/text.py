"""Exact checks of what stands around the graph: configuration, tokenizer, chat template, special ids, generation.

A wrong merge or a lost end token changes what every user sees, and no teacher-forced metric sees it.
Try: ``llama-onnx validate FOLDER --baseline demo --only tokenizer,chat_template,special_ids``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np

from bench.gate.found import Found, exact, first_difference
from bench.gate.subject import Subject
from export.manifest import GENAI_CONFIG, first_line
from export.spelling import fill_defaults
from reports.validation import Finding

VOLATILE = {
    "_name_or_path",
    "_commit_hash",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "llama_onnx_origin",
    "name_or_path",
    "rope_parameters",
}
"""Keys of a configuration that say nothing about what the model computes, or say it a second time."""
RELATED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "phi3", "falcon", "gpt_neo", "gpt2")
"""Keys of these architectures count as read by some loader, whatever the model."""
ALWAYS_READ = {"quantization_config", "auto_map"}
STRESS = (
    "The quick brown fox: 3.14159, 1,000,000 and 42!",
    "  leading, trailing and   many spaces \t tabs\n\nnew lines  ",
    "naïve café, Straße, łódź, Ελλάδα, Привет, 你好世界, こんにちは, 안녕하세요, مرحبا",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # code",
    "emoji 🙂👍🏽 and symbols ∑∫√ → ≤ €",
    "don't I'll we're JOHN'S iPhone x86_64 a/b\\c user@example.org",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa 0000000000 ----------",
)
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello."}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "  What is 2+2?\n"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three <b>&"},
    ],
)
MOST_TEXTS = 60


def config(s: Subject) -> Found:
    """config.json against the baseline's, but for keys that say nothing about the model."""
    from transformers import AutoConfig

    from export.newer_config import readable

    path = s.folder / "config.json"
    if not path.is_file():
        return Found("REPORTED", "no config.json in the folder")
    try:
        folder = readable(s.folder)  # another tool may have saved it by transformers 5
        ours = _described(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except Exception as e:  # ours, or whatever transformers' classes stumble over
        return exact([Finding(where="config.json", what=first_line(e)[:160])], "")
    theirs = _described(s.baseline.config)
    foreign = {k for k in ours.keys() ^ theirs.keys() if k not in VOLATILE | _read_keys()}
    findings = _differences("config.json", *({k: v for k, v in c.items() if k not in foreign} for c in (ours, theirs)))
    notes = [f"keys that no loader reads: {', '.join(sorted(foreign)[:5])}"] if foreign else []
    return exact(findings, "config.json describes the baseline", notes)


def _described(config: Any) -> dict[str, Any]:
    """A configuration as transformers 4 writes it, whichever read it."""
    from export.errors import UnsupportedModelError
    from export.newer_config import older

    raw: dict[str, Any] = config.to_dict()
    try:
        return older(raw)
    except UnsupportedModelError:  # for each type of layer
        return raw | {"rope_scaling": raw["rope_parameters"]}


@cache
def _read_keys() -> frozenset[str]:
    """Keys of config.json that some loader reads."""
    from transformers import CONFIG_MAPPING

    return frozenset(ALWAYS_READ).union(*(CONFIG_MAPPING[name]().to_dict() for name in RELATED))


def _differences(where: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[Finding]:
    keys = sorted((ours.keys() | theirs.keys()) - VOLATILE)
    return [
        Finding(where=f"{where}, {k}", what=f"is {ours.get(k)!r}, the baseline has {theirs.get(k)!r}"[:200])
        for k in keys
        if _effect(k, ours.get(k)) != _effect(k, theirs.get(k))
        and (k != "architectures" or (ours.get(k) and theirs.get(k)))  # a tool may leave it out
    ]


def _effect(key: str, value: Any) -> Any:
    """What a setting does: numbers as fp32 has them, a list of one end token as the token, one name of a rope type."""
    if isinstance(value, dict):
        named = {k: v for k, v in value.items() if not (k == "type" and "rope_type" in value)}
        return {k: _effect(k, v) for k, v in named.items()}
    if isinstance(value, list) and key.endswith("_token_id"):
        return (value[0] if value else None) if len(value) < 2 else sorted(value, key=str)
    return float(np.float32(value)) if isinstance(value, float) else value


def _tokenizer_json(folder: Path) -> dict[str, Any] | None:
    """tokenizer.json as the tokenizers library writes it again: another serialisation of it reads the same."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    return _plain(Tokenizer.from_file(str(path)))


def _plain(made: Any) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(made.to_str())
    after = raw.get("post_processor") or {}
    if after.get("type") == "TemplateProcessing" and not after.get("special_tokens"):
        raw["post_processor"] = None  # transformers 5 writes it out; it adds nothing to the ids
    return {k: v for k, v in raw.items() if k != "version"}


def _tokenizers(check: Callable[[Subject, Any, Any], Found]) -> Callable[[Subject], Found]:
    """The check of the folder's tokenizer beside the baseline's; one that cannot be loaded is its finding."""

    @wraps(check)
    def run(s: Subject) -> Found:
        from runtime.errors import SessionError
        from runtime.text import load_tokenizer

        try:
            ours = load_tokenizer(s.folder)
        except SessionError as e:
            return exact([Finding(where="tokenizer", what=str(e))], "")
        return check(s, ours, s.tokenizer)

    return run


@_tokenizers
def tokenizer(s: Subject, ours: Any, theirs: Any) -> Found:
    """The tokenizer's parts one by one, and the ids of many texts, with the way back."""
    findings = []
    a, b = _tokenizer_json(s.folder), _tokenizer_json(s.baseline.checkpoint)
    if a is not None and b is None and s.sealed and getattr(theirs, "is_fast", False):
        b = _plain(theirs.backend_tokenizer)  # an older form, out of which the export made a tokenizer.json as well
    if a is not None and b is not None:
        findings += _parts(a, b)
    findings += _settings(ours, theirs, s)
    texts = [*STRESS, *(t for item in s.dataset.items for t in item.fields.values())]
    step = max(1, len(texts) // MOST_TEXTS)
    chosen = [*STRESS, *texts[len(STRESS) :: step]]
    for text in chosen:
        left, right = ours(text)["input_ids"], theirs(text)["input_ids"]
        if left != right:
            k = first_difference(left, right)
            findings.append(
                Finding(where=f"text {text[:40]!r}", what=f"token {k} is {left[k : k + 1]}, not {right[k : k + 1]}")
            )
            break
        if ours.decode(left) != theirs.decode(right):
            findings.append(Finding(where=f"text {text[:40]!r}", what="decodes to another text"))
            break
    return exact(findings, f"every part equal, {len(chosen)} texts give the same ids and come back")


SETTINGS = {
    "split_special_tokens": "which changes how special tokens in a text are cut",
    "clean_up_tokenization_spaces": "which changes blanks in decoded text",
    "model_max_length": "beyond which texts are cut off",
}
"""What tokenizer_config.json sets on a tokenizer beside its parts, and what it does.

On which side batches are padded or cut changes no text's ids, and who runs a graph pads as the graph demands.
"""


def _settings(ours: Any, theirs: Any, s: Subject) -> list[Finding]:
    """Settings that no text of a check need show: how special tokens are cut, what is stripped, which file is read."""
    findings = []
    for name, effect in SETTINGS.items():
        a, b = getattr(ours, name, None), getattr(theirs, name, None)
        if a != b:
            what = f"is {a}, the baseline has {b}, {effect}"
            findings.append(Finding(where=f"tokenizer_config.json, {name}", what=what))
    a, b = ({i: repr(t) for i, t in getattr(x, "added_tokens_decoder", {}).items()} for x in (ours, theirs))
    wrong = sorted(i for i in a.keys() | b.keys() if a.get(i) != b.get(i))
    if wrong:
        what = f"is {a.get(wrong[0])}, the baseline has {b.get(wrong[0])}"
        findings.append(Finding(where=f"tokenizer_config.json, added token {wrong[0]}", what=what))
    findings += _written_ids(s, ours)
    # The first names another tokenizer.json for transformers to read, the second a Python class.
    configs = [_json(f / "tokenizer_config.json") or {} for f in (s.folder, s.baseline.checkpoint)]
    for key in ("fast_tokenizer_files", "auto_map"):
        a, b = (c.get(key) for c in configs)
        if a != b:
            findings.append(Finding(where=f"tokenizer_config.json, {key}", what=f"is {a}, the baseline has {b}"))
    return findings


def _written_ids(s: Subject, ours: Any) -> list[Finding]:
    """Ids that files give to added tokens, but for the baseline's own, and that the tokenizer does not use.

    transformers takes no notice of them where the vocabulary or the order says otherwise; other readers do.
    """
    strange = _ids_in(s.folder) - _ids_in(s.baseline.checkpoint)
    return [
        Finding(where=f"{name}, {token!r}", what=f"has the id {i}, the tokenizer gives {known}")
        for name, token, i in sorted(strange, key=str)
        if (known := ours.convert_tokens_to_ids(token)) != i
    ]


def _ids_in(folder: Path) -> set[tuple[str, str, Any]]:
    """(file, token, id) of every added token that some file of a folder lists."""
    files = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    raw, config, added = (_json(folder / name) or {} for name in files)
    listed = [(files[0], t.get("content"), t.get("id")) for t in raw.get("added_tokens") or []]
    listed += [(files[1], t.get("content"), int(i)) for i, t in (config.get("added_tokens_decoder") or {}).items()]
    return {*listed, *((files[2], token, i) for token, i in added.items())}


def _parts(ours: dict[str, Any], theirs: dict[str, Any]) -> list[Finding]:
    findings = []
    for part in sorted(ours.keys() | theirs.keys()):
        x, y = ours.get(part), theirs.get(part)
        if x == y:
            continue
        if part != "model" or not isinstance(x, dict) or not isinstance(y, dict):
            findings.append(Finding(where=f"tokenizer.json, {part}", what="is not the baseline's"))
            continue
        for key in sorted(x.keys() | y.keys()):
            v, w = x.get(key), y.get(key)
            if v == w:
                continue
            what = "is not the baseline's"
            if isinstance(v, list) and isinstance(w, list):
                k = first_difference(v, w)
                what = (
                    f"differs from entry {k} on ({v[k : k + 1]}, the baseline has {w[k : k + 1]}; {len(v)} of {len(w)})"
                )
            elif isinstance(v, dict) and isinstance(w, dict):
                n = [t for t in v.keys() | w.keys() if v.get(t) != w.get(t)]
                what = f"differs in {len(n)} entries, such as {sorted(n)[0]!r}"
            findings.append(Finding(where=f"tokenizer.json, model.{key}", what=what))
    return findings


@_tokenizers
def chat_template(s: Subject, ours: Any, theirs: Any) -> Found:
    """The chat template, as text and by what it makes of three conversations."""
    a, b = getattr(ours, "chat_template", None), getattr(theirs, "chat_template", None)
    if not a and not b:
        return Found("REPORTED", "neither side has a chat template")
    if not a or not b:
        return exact([Finding(where="chat template", what="is missing" if b else "is one that the baseline lacks")], "")
    findings = []
    inline = (_json(s.folder / "tokenizer_config.json") or {}).get("chat_template")
    if isinstance(inline, list):
        inline = {t.get("name"): t.get("template") for t in inline}
    if inline and _meaning(inline) != _meaning(a):
        what = "is not chat_template.jinja's, and onnxruntime-genai takes it first; remove it"
        findings.append(Finding(where="tokenizer_config.json, chat_template", what=what))
    for k, chat in enumerate(CHATS):
        for prompt in (True, False):
            left, right = (_render(t, chat, prompt) for t in (ours, theirs))
            if left != right:
                findings.append(
                    Finding(
                        where=f"chat template, conversation {k + 1}",
                        what=f"gives {_around(left, right)!r}, the baseline's gives {_around(right, left)!r}",
                    )
                )
    if not findings and _meaning(a) != _meaning(b):
        # A condition on one word would show in no rendering.
        what = f"is another one, though it renders {len(CHATS)} conversations alike; use the baseline's"
        findings.append(Finding(where="chat template", what=what))
    return exact(findings, f"{2 * len(CHATS)} renderings equal, template equal")


def _meaning(template: Any) -> Any:
    """What a template (or several by name) does, comments and layout of its code aside; else its text."""
    import jinja2

    if isinstance(template, dict):
        return {name: _meaning(t) for name, t in template.items()}
    text = str(template).replace("\r\n", "\n").strip()
    # As transformers compiles it; a template with a tag of transformers' own is compared as text.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    try:
        # A comment in the middle cuts a text in two.
        return repr(environment.parse(text)).replace("'), TemplateData(data='", "")
    except jinja2.TemplateSyntaxError:
        return text


def _render(tokenizer: Any, chat: list[dict[str, str]], prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))
    except Exception as e:  # whatever a template raises (it may refuse a system message) has to be the same
        return f"raises {type(e).__name__}"


def _around(text: str, other: str) -> str:
    k = first_difference(text, other)
    return text[max(0, k - 10) : k + 30]


@_tokenizers
def special_ids(s: Subject, ours: Any, theirs: Any) -> Found:
    """bos, eos, pad and unk ids of tokenizer, manifest, genai_config.json; the added tokens."""
    findings = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        a, b = getattr(ours, name, None), getattr(theirs, name, None)
        if a != b:
            findings.append(Finding(where=f"tokenizer, {name}", what=f"is {a}, the baseline's is {b}"))
    if ours.get_added_vocab() != theirs.get_added_vocab():
        differ = sorted(set(ours.get_added_vocab().items()) ^ set(theirs.get_added_vocab().items()))
        findings.append(Finding(where="tokenizer, added tokens", what=f"differ, such as {differ[0]}"))
    wanted, notes = s.baseline.eos, []
    if set(s.manifest.eos_token_ids) != set(wanted):
        what = f"generation ends at {list(s.manifest.eos_token_ids)}, not {list(wanted)}"
        findings.append(Finding(where="eos_token_ids", what=what))
    genai = s.folder / GENAI_CONFIG
    if genai.is_file():
        model = json.loads(genai.read_text(encoding="utf-8")).get("model", {})
        value = model.get("eos_token_id")
        have = tuple(value) if isinstance(value, list) else () if value is None else (value,)
        if not wanted and have in ((), (0,)):
            notes = ["the model has no end token; onnxruntime-genai, which has to have one, ends at token 0"]
        elif set(have) != set(wanted):
            what = f"is {list(have)}, not {list(wanted)}"
            findings.append(Finding(where="genai_config.json, eos_token_id", what=what))
        context = model.get("context_length")
        if context not in (None, s.baseline.context):
            findings.append(Finding(where="genai_config.json, context_length", what=f"is {context}"))
        findings += _genai(s, genai)
    equal = f"bos, eos {list(wanted)}, pad, unk and {len(theirs.get_added_vocab())} added tokens equal"
    return exact(findings, equal, notes)


def _genai(s: Subject, path: Path) -> list[Finding]:
    """What onnxruntime-genai is told: in our folders exactly what the export writes (but for session options)."""
    from export.genai import genai_config

    found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    if not s.ours:
        decoder = found.get("model", {}).get("decoder", {})
        wrong: dict[str, tuple[Any, Any]] = {"filename": (decoder.get("filename"), s.manifest.decode_graph)}
        wrong |= {"sliding_window": (decoder.get("sliding_window"), None)}
    else:
        m = s.manifest
        ours = _flat(found)
        theirs = _flat(genai_config(s.baseline.config, m.decode_graph, s.baseline.eos, m.oldest_runtime))
        wrong = {k: (ours.get(k), theirs.get(k)) for k in sorted(ours.keys() | theirs.keys())}
    return [
        Finding(where=f"genai_config.json, {key}", what=f"is {a!r}, the export has {b!r}"[:200])
        for key, (a, b) in wrong.items()
        if a != b and ".session_options" not in key and not key.endswith(("eos_token_id", "context_length"))
    ]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one with a key twice is read differently by different programs."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{next(k for k, _ in pairs if sum(k == x for x, _ in pairs) > 1)!r} is there twice")
    return found


def _flat(raw: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, keys joined by dots."""
    if not isinstance(raw, dict):
        return {prefix: raw}
    out: dict[str, Any] = {}
    for key, value in raw.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return out


def generation_config(s: Subject) -> Found:
    """generation_config.json against the baseline's: end tokens and sampling settings."""
    ours, theirs = (_generation(f / "generation_config.json") for f in (s.folder, s.baseline.checkpoint))
    if ours is None and theirs is None:
        return Found("REPORTED", "neither side has a generation_config.json")
    if ours is None and not s.sealed and (s.folder / GENAI_CONFIG).is_file():
        return Found("REPORTED", "onnxruntime-genai's layout has its settings in genai_config.json")
    if ours is None:
        return exact([Finding(where="generation_config.json", what="is missing")], "")
    return exact(_differences("generation_config.json", ours, theirs or {}), "generation settings equal")


def _generation(path: Path) -> dict[str, Any] | None:
    """A file of generation settings with transformers' defaults filled in: it writes only what differs from them."""
    from transformers import GenerationConfig

    raw = _json(path)
    if raw is None:
        return None
    try:
        filled: dict[str, Any] = fill_defaults(GenerationConfig.from_dict(raw)).to_dict()
        return filled
    except (ValueError, TypeError, AttributeError):  # settings that it refuses are compared as they stand
        return raw


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    raw = json.loads(path.read_text(encoding="utf-8"))
    return raw if isinstance(raw, dict) else {"": raw}
