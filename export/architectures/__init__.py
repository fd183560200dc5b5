"""The architectures that have a fused export, one file each.

Try: ``python -c "from export.architectures import ARCHITECTURES; print(*ARCHITECTURES)"``.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from export.architectures.base import Architecture
from export.architectures.llama import LLAMA
from export.architectures.ministral import MINISTRAL
from export.architectures.mistral import MISTRAL
from export.architectures.qwen2 import QWEN2
from export.architectures.qwen3 import QWEN3
from export.errors import UnsupportedModelError

ARCHITECTURES = {a.model_type: a for a in (LLAMA, MISTRAL, MINISTRAL, QWEN2, QWEN3)}
"""By ``model_type`` of config.json."""
_EXPERTS = "its layers are mixtures of experts"
_GEMMA = "its norms add 1 to their weights, its embedding is scaled"
WHY_NOT = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe"), _EXPERTS),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), _GEMMA),
    "phi3": "its QKV and gate/up projections are stored as one",
}
"""Why an architecture that is often asked for has none."""


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The description of a configuration's architecture.

    Raises:
        UnsupportedModelError: it is not described yet.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        reason = WHY_NOT.get(config.model_type)
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has no fused export{f' ({reason})' if reason else ''}; it exists for "
            f"{', '.join(ARCHITECTURES)}. --target plain takes what optimum can export"
        )
    return found


def has_fused_export(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a described architecture and has nothing that the fused graph lacks."""
    try:
        architecture_of(config).require(config)
    except UnsupportedModelError:
        return False
    return True
