"""What every document of this package is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


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
