"""Public test sets through the ``datasets`` library: ``--dataset hf:NAME[:CONFIG][@SPLIT]``.

Four sets have a template that turns their rows into items: WikiText-2 (word perplexity), CNN/DailyMail (ROUGE as
MLPerf), WMT14 (BLEU; CONFIG is the direction, ``en-de``) and SQuAD. A copy on this machine in the set's own format
(parquet, JSONL, ``save_to_disk``) is named by its path and its template: ``hf:/data/wikitext:wikitext@test``.

Try: ``llama-onnx perplexity FOLDER --dataset hf:wikitext``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.data.items import LANGUAGES, Dataset, Item
from bench.errors import DatasetError
from export.manifest import first_line

Row = Mapping[str, Any]
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
SPLIT_NAMES = ("train", "validation", "test", "dev")


@dataclass(frozen=True)
class Template:
    """How a public set becomes items. ``config`` and ``split`` are what is taken when none is named.

    Of ``hub_names`` the first is the short one and the second what the hub calls it.
    """

    name: str
    hub_names: tuple[str, ...]
    config: str
    split: str
    columns: tuple[str, ...]
    items: Callable[[Iterable[Row], str], Iterator[Item]]


@dataclass(frozen=True)
class Spec:
    """The parts of ``hf:...``; ``path`` is set for a local copy."""

    text: str
    template: Template
    hub_name: str
    path: Path | None
    config: str
    split: str | None


# -- rows to items ----------------------------------------------------------------------------------------------------

_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
_LAST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenise_wikitext(page: str) -> str:
    """Undo WikiText's tokenisation, with the replacements (and their order) that lm-evaluation-harness applies.

    Left out is one of its rules that needs the literal text ``/' 5/``.
    """
    text = page.replace("s '", "s'")
    for old, new in [(f" @{c}@ ", c) for c in "-,."] + [(f" {c} ", f"{c} ") for c in ":;.!?,"]:
        text = text.replace(old, new)
    for left, right in _PAIRS:
        inner = rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"
        text = re.sub(inner, rf"{left}\1{right}", text)
    for old, new in _LAST:
        text = text.replace(old, new)
    return text


def wikitext_pages(lines: Iterable[str]) -> Iterator[str]:
    """Rows of the line-by-line set, put together to pages that start with a title; blank lines as in the raw file."""
    page: list[str] = []
    for row in lines:
        line = row.rstrip("\n") if row.strip() else " "
        if re.fullmatch(r"\s*= (?!=).*(?<!=) =\s*", line):
            if "".join(page).strip():
                yield "\n".join(page)
            page = []
        page.append(line)
    if "".join(page).strip():
        yield "\n".join([*page, ""])


def _wikitext(rows: Iterable[Row], _config: str) -> Iterator[Item]:
    rows = list(rows)
    if rows and "page" in rows[0]:
        pages: Iterable[str] = (_text(r, "page", k) for k, r in enumerate(rows))
    else:
        pages = wikitext_pages(_text(r, "text", k, empty=True) for k, r in enumerate(rows))
    for k, page in enumerate(pages):
        yield Item(f"page-{k}", "perplexity", {"text": detokenise_wikitext(page), "original": page}, ())


def _cnn_dailymail(rows: Iterable[Row], _config: str) -> Iterator[Item]:
    for k, row in enumerate(rows):
        fields = {"text": _text(row, "article", k)}
        yield Item(str(row.get("id", k)), "cnn_dailymail", fields, (_text(row, "highlights", k),))


def _wmt14(rows: Iterable[Row], config: str) -> Iterator[Item]:
    source, target = _direction(config)
    for k, row in enumerate(rows):
        pair = row["translation"]
        if not isinstance(pair, Mapping) or not {source, target} <= set(pair):
            raise DatasetError(f"row {k} has no {source} and {target} under 'translation'; name another direction")
        fields = {"text": _text(pair, source, k), "source_lang": source, "target_lang": target}
        yield Item(f"{config}-{k}", "translation", fields, (_text(pair, target, k),))


def _squad(rows: Iterable[Row], _config: str) -> Iterator[Item]:
    for k, row in enumerate(rows):
        answers = row["answers"]
        texts = answers.get("text") if isinstance(answers, Mapping) else None
        if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts:
            raise DatasetError(f"row {k} has no answer; SQuAD 2.0's unanswerable questions have none: use squad")
        fields = {"context": _text(row, "context", k), "question": _text(row, "question", k).strip()}
        yield Item(str(row.get("id", k)), "qa", fields, tuple(dict.fromkeys(str(t) for t in texts)))


def _text(row: Row, column: str, number: int, empty: bool = False) -> str:
    value = row[column]
    if not isinstance(value, str) or not (empty or value.strip()):
        raise DatasetError(f"row {number}: {column!r} is empty or not a text; use a whole copy of the set")
    return value


def _direction(config: str) -> tuple[str, str]:
    parts = config.split("-")
    if len(parts) != 2 or parts[0] == parts[1] or "en" not in parts or not set(parts) <= set(LANGUAGES):
        raise DatasetError(f"{config!r} is no direction of WMT14; write for example hf:wmt14:en-de or hf:wmt14:fr-en")
    return parts[0], parts[1]


TEMPLATES = {
    t.name: t
    for t in (
        Template(
            "wikitext",
            ("wikitext", "Salesforce/wikitext", "EleutherAI/wikitext_document_level"),
            "wikitext-2-raw-v1",
            "test",
            ("text|page",),
            _wikitext,
        ),
        Template(
            "cnn_dailymail",
            ("cnn_dailymail", "abisee/cnn_dailymail"),
            "3.0.0",
            "validation",
            ("article", "highlights"),
            _cnn_dailymail,
        ),
        Template("wmt14", ("wmt14", "wmt/wmt14"), "en-de", "test", ("translation",), _wmt14),
        Template(
            "squad",
            ("squad", "rajpurkar/squad"),
            "plain_text",
            "validation",
            ("context", "question", "answers"),
            _squad,
        ),
    )
}


# -- reading ----------------------------------------------------------------------------------------------------------


def parse(text: str) -> Spec:
    """``hf:NAME[:CONFIG][@SPLIT]`` or ``hf:PATH:TEMPLATE[:CONFIG][@SPLIT]`` (a path starts with ``/``, ``.``, ``~``).

    Raises:
        DatasetError: no such form, or a set or template that is not known.
    """
    known = ", ".join(TEMPLATES)
    body, at, split = text.removeprefix("hf:").rpartition("@")
    if not at:
        body, split = split, ""
    if body.startswith(("/", ".", "~")):
        local = re.fullmatch(rf"(.+?):({'|'.join(TEMPLATES)})(?::(.*))?", body)  # the path itself may hold colons
        if local is None:
            unknown = "" if Path(body).expanduser().exists() else body.partition(":")[2]
            if unknown:
                raise DatasetError(f"{text}: unknown template {unknown!r}; choose one of {known}")
            raise DatasetError(f"{text}: say which set's format it has: {text}:TEMPLATE, one of {known}")
        template = TEMPLATES[local[2]]
        return Spec(text, template, "", Path(local[1]).expanduser(), local[3] or template.config, split or None)
    name, _, config = body.partition(":")
    found = next((t for t in TEMPLATES.values() if name in t.hub_names), None)
    if found is None:
        raise DatasetError(f"{text}: no template for {name or 'an empty name'!r}; choose one of {known}, or use JSONL")
    hub_name = name if "/" in name else found.hub_names[1]
    return Spec(text, found, hub_name, None, config or found.config, split or found.split)


def load_hf(text: str) -> Dataset:
    """The set that ``text`` names, as items. The digest is over the items, so it does not depend on the file format.

    Raises:
        DatasetError: unknown set, template, configuration or split; not reachable; a column missing; no rows.
    """
    try:
        import datasets
    except ImportError:
        raise DatasetError(f"{text} needs the datasets library: pip install 'datasets>=4'") from None
    spec = parse(text)
    if spec.template.name == "wmt14":
        _direction(spec.config)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said once, by the error
    rows = _local_rows(spec) if spec.path else _hub_rows(spec)
    if not rows:
        raise DatasetError(f"{text} has no rows; name another split with @SPLIT")
    for column in spec.template.columns:
        if not set(column.split("|")) & set(rows[0]):
            raise DatasetError(
                f"{text} has no column {column.replace('|', ' or ')!r} (it has {', '.join(rows[0])}), so it is not in "
                f"the format of {spec.template.name}; choose another template or use JSONL"
            )
    try:
        items = tuple(spec.template.items(rows, spec.config))
    except DatasetError as e:
        raise DatasetError(f"{text}: {e}") from None
    digest = hashlib.sha256()
    for item in items:
        facts = [item.id, item.task, item.fields, item.references]
        digest.update(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    where = f"{spec.path.name}:{spec.template.name}" if spec.path else spec.hub_name
    at = f"@{spec.split}" if spec.split else ""
    return Dataset(f"hf:{where}:{spec.config}{at}", digest.hexdigest(), items)


def _hub_rows(spec: Spec) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    config = spec.config
    if spec.template.name == "wmt14":  # the set names its pairs with English last, whatever the direction
        config = "-".join(sorted(_direction(config), key=lambda code: code == "en"))
    try:
        return list(datasets.load_dataset(spec.hub_name, config, split=spec.split))
    except DatasetNotFoundError as e:
        raise DatasetError(f"{spec.text}: no such set on the hub, or no access ({first_line(e)})") from None
    except ValueError as e:
        raise DatasetError(f"{spec.text}: {first_line(e)}; name another CONFIG or @SPLIT") from None
    except (ConnectionError, OSError, RuntimeError) as e:
        raise DatasetError(
            f"{spec.text} cannot be had from the hub ({first_line(e)}); copy it here once and pass "
            f"hf:/path/to/copy:{spec.template.name}"
        ) from None


def _local_rows(spec: Spec) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    path = spec.path
    assert path is not None
    if not path.exists():
        raise DatasetError(f"{spec.text}: nothing at {path}; pass a folder or file with the set's rows")
    name, _, cut = (spec.split or "").partition("[")
    try:
        if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
            saved = datasets.load_from_disk(str(path), keep_in_memory=True)
            chosen = saved[name or spec.template.split] if isinstance(saved, datasets.DatasetDict) else saved
            return list(chosen)
        files = _files(spec, path, name)
        with TemporaryDirectory() as scratch:  # never an older conversion of a file that was edited since
            loaded = datasets.load_dataset(
                BUILDERS[files[0].suffix],
                data_files=[str(f) for f in files],
                split=f"train[{cut}" if cut else "train",
                cache_dir=scratch,
                keep_in_memory=True,
            )
            return list(loaded)
    except KeyError:
        raise DatasetError(f"{spec.text}: no split {name or spec.template.split!r} in {path}; name it @SPLIT") from None
    except (OSError, ValueError, RuntimeError, DatasetsError) as e:
        cause = e.__cause__ or e
        raise DatasetError(f"{spec.text}: {path} cannot be read ({first_line(cause)}); get the copy again") from None


def _files(spec: Spec, path: Path, split: str) -> list[Path]:
    """The files of one split: those that carry its name, or all where none is named after a split."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in BUILDERS)
    files = [f for f in files if f.suffix in BUILDERS]
    named = {f: next((s for s in SPLIT_NAMES if re.match(rf"{s}\b|{s}[-_.]", f.name)), "") for f in files}
    wanted = split or (spec.template.split if any(named.values()) and path.is_dir() else "")
    if wanted and any(named.values()):
        files = [f for f in files if named[f] == wanted]
    kinds = {BUILDERS[f.suffix] for f in files}
    if len(kinds) != 1:
        what = "files of several formats" if kinds else f"no file of split {wanted!r}" if wanted else "no data file"
        raise DatasetError(
            f"{spec.text}: {what} in {path}; wanted {', '.join(BUILDERS)} of one format, named after their split"
        )
    return files
