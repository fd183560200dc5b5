"""What every document of this package is made of, and how one is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reports.errors import RecordError

Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
"""A measured number: not ``true``, not ``"0.02"``, not infinity, all of which would else become times."""

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by key, in the order in which they come."""
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


class Frozen(BaseModel):
    """An immutable document part; unknown fields are refused, infinity and NaN are written as such."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


Model = TypeVar("Model", bound=Frozen)


class Machine(Frozen):
    """Where it ran. ``fingerprint`` is equal for machines whose measurements may be compared."""

    fingerprint: str
    cpu: str
    cores: int
    memory_bytes: int
    os: str
    python: str
    gpu: str | None
    load_average_1m: float | None


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        RecordError: cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise RecordError(f"cannot read {path}: {e}") from None


def parse(text: str, where: object) -> Any:
    """A JSON text; ``where`` names it in errors.

    Raises:
        RecordError: not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as e:
        raise RecordError(f"{where} is not valid JSON ({e})") from None


def first_problem(e: ValidationError) -> str:
    """Place and words of the first thing that a schema refuses."""
    first = e.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, "))))


def validate(raw: object, model: type[Model], where: object) -> Model:
    """A JSON value as a model; ``where`` names it in errors.

    Raises:
        RecordError: a field of the wrong form (its place is named).
    """
    try:
        return model.model_validate(raw)
    except ValidationError as e:
        raise RecordError(f"{where}: {first_problem(e)} ({e.error_count()} problem(s) in all)") from None


def first_document(path: Path) -> Any:
    """A file's JSON document, of JSON Lines the first one; None where it does not begin with one.

    Raises:
        RecordError: cannot be read.
    """
    text = read_text(path)
    try:
        return json.JSONDecoder().raw_decode(text.lstrip())[0]
    except ValueError:
        return None


def kind_of(document: object) -> str | None:
    """The ``kind`` by which each of our documents names itself, ``pytest-benchmark`` for that tool's JSON, else None.

    ``record`` (:class:`reports.record.RunRecord`), ``comparison`` and ``case`` (:mod:`reports.comparison`; a line of a
    JSON Lines file), ``validation`` (:mod:`reports.validation`) and ``matrix`` (:mod:`reports.matrix`). Case records
    made by other tools need not name it.
    """
    if not isinstance(document, dict):
        return None
    if "kind" not in document and isinstance(document.get("benchmarks"), list):
        return "pytest-benchmark"
    kind = document.get("kind")
    return kind if isinstance(kind, str) else None


def write_schema(model: type[Frozen], mode: Literal["serialization", "validation"] = "serialization") -> None:
    """Write the JSON Schema (draft 2020-12) of a document into this folder."""
    kind = model.model_fields["kind"].default
    (Path(__file__).parent / f"{kind}.schema.json").write_text(schema_text(model, mode), encoding="utf-8")


def schema_text(model: type[Frozen], mode: Literal["serialization", "validation"] = "serialization") -> str:
    """The JSON Schema (draft 2020-12) of a document, as it stands in ``reports/KIND.schema.json``."""
    schema = model.model_json_schema(mode=mode)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"llama-onnx-bench {model.model_fields['kind'].default}, version 1"
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


class Document(Frozen):
    """What is a JSON file of its own; its fields ``kind`` and ``schema_version`` name it."""

    def to_json(self) -> str:
        """Indented JSON, newline at the end."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read one of our JSON documents.

        Raises:
            RecordError: cannot be read, not JSON, another kind or schema version, or a field of the wrong form (its
                place is named).
        """
        kind, version = (cls.model_fields[name].default for name in ("kind", "schema_version"))
        raw = parse(read_text(path), path)
        found = raw if isinstance(raw, dict) else {}
        if found.get("kind") != kind:
            raise RecordError(f"{path} is of kind {found.get('kind')!r}; pass a {kind}.json")
        has = found.get("schema_version")
        if has != version:
            raise RecordError(f"{path} has {kind} schema version {has!r}, this tool reads {version}")
        return validate(raw, cls, path)
