"""What every document of this package is made of, and how one is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from reports.errors import RecordError


class Frozen(BaseModel):
    """An immutable document part; unknown fields are refused, infinity and NaN are written as such."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


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


Document = TypeVar("Document", bound=Frozen)


def read_model(path: Path, model: type[Document]) -> Document:
    """Read one of our JSON documents, whose ``kind`` and ``schema_version`` are those of ``model``.

    Raises:
        RecordError: cannot be read, not JSON, another kind or schema version, or a field of the wrong form (its place
            is named).
    """
    kind, version = (model.model_fields[name].default for name in ("kind", "schema_version"))
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise RecordError(f"cannot read {path}: {e}") from None
    except ValueError as e:
        raise RecordError(f"{path} is not valid JSON ({e})") from None
    found = raw if isinstance(raw, dict) else {}
    if found.get("kind") != kind:
        raise RecordError(f"{path} is of kind {found.get('kind')!r}; pass a {kind}.json")
    has = found.get("schema_version")
    if has != version:
        raise RecordError(f"{path} has {kind} schema version {has!r}, this tool reads {version}")
    try:
        return model.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise RecordError(f"{path}: {place}: {first['msg']} ({e.error_count()} problem(s) in all)") from None
