"""What the recipient of a certificate demands of it, from a file: who signs and who demands are two.

Try: ``echo "mode: standard" > policy.yaml; llama-onnx verify cert.json FOLDER --policy policy.yaml``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.certificate.statement import CertificateError
from bench.gate.modes import MODES
from reports.base import first_problem
from reports.validation import Validation


class Policy(BaseModel):
    """Every demand is optional; ``mode`` is the least one, ``key`` the PEM file of the signer's public key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    baseline_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] | None = None
    provider: str | None = None
    mode: Literal["quick", "standard", "full"] | None = None
    max_age_days: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    require_signature: bool = False
    key: str | None = None

    def check(self, validation: Validation) -> None:
        """Hold a certified result against what is demanded of it.

        Raises:
            CertificateError: it is another one; names the demand and both values.
        """
        for demand, have in (
            ("baseline_sha256", validation.baseline_sha256),
            ("precision", validation.tier),
            ("provider", validation.session.get("provider")),
            ("mode", validation.mode),
        ):
            wanted = getattr(self, demand)
            order = list(MODES)
            enough = demand == "mode" and wanted and order.index(validation.mode) >= order.index(wanted)
            if wanted is not None and have != wanted and not enough:
                least = "at least " if demand == "mode" else ""
                raise CertificateError(
                    "policy", f"the policy's {demand} is {least}{wanted}, the certificate says {have}"
                )
        if self.provider and (elsewhere := validation.session.get("partly_elsewhere")):
            raise CertificateError("policy", f"the policy's provider is {self.provider}, the certificate: {elsewhere}")


def read_policy(path: Path) -> Policy:
    """A policy in YAML or JSON (which is YAML); the path of its key is relative to the file.

    Raises:
        CertificateError: unreadable, a key that is not known or stands twice, or a value of another kind.
    """
    import yaml

    def wrong(what: str) -> CertificateError:
        known = ", ".join(Policy.model_fields)
        return CertificateError("bad-policy", f"the policy {path}: {what}; known keys: {known}", 2)

    try:
        text = path.read_text(encoding="utf-8")
        node, raw = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except OSError as e:
        raise wrong(f"cannot be read ({e.strerror})") from None
    except (yaml.YAMLError, ValueError) as e:
        raise wrong(f"is no YAML or JSON ({str(e).splitlines()[0]})") from None
    if not isinstance(node, yaml.MappingNode) or not isinstance(raw, dict):
        raise wrong("is no mapping of keys to values")
    if len(raw) != len(node.value):
        raise wrong("a key stands twice")
    try:
        policy = Policy.model_validate(raw)
    except ValidationError as e:
        raise wrong(first_problem(e)) from None
    return policy.model_copy(update={"key": str(path.parent / policy.key)}) if policy.key else policy
