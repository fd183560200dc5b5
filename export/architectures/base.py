"""What the fused export and the gate have to know of a decoder, in one description.

All of these decoders have the layer that :func:`export.fused._decoder_layer` emits: a norm, attention over grouped
heads with rotary embedding, a norm, a gated MLP with SiLU, and a residual addition around both halves. A description
says what differs. A model whose layers hold any other tensor is refused, so nothing is left out in silence.
docs/architectures.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from export.errors import BrokenCheckpointError, UnsupportedModelError
from export.sizes import head_dim_of
from export.spelling import rope_of

Windows = tuple[int | None, ...]
"""For each layer the tokens that a token attends to, itself included; None for all before it."""
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
MATRICES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
"""Linear layers of a decoder layer; each may have a bias."""
_PLAIN = "use --target plain, optimum's own graph"
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def every_layer(window: int | None, config: PretrainedConfig) -> Windows:
    """One window in every layer."""
    return (_checked(window, config),) * int(config.num_hidden_layers)


def by_layer_types(config: PretrainedConfig) -> Windows:
    """The window in layers that ``layer_types`` calls ``sliding_attention``."""
    if other := sorted(set(config.layer_types) - {"full_attention", "sliding_attention"}):
        raise UnsupportedModelError(f"config.json: layer_types has {other[0]!r}, which the fused graph lacks; {_PLAIN}")
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    if any(sliding) and config.sliding_window is None:
        raise BrokenCheckpointError(
            "config.json: layer_types names sliding_attention, but there is no sliding_window, or use_sliding_window "
            "is false; set them, or make those layers full_attention"
        )
    window = _checked(config.sliding_window, config)
    return tuple(window if yes else None for yes in sliding)


def _checked(window: Any, config: PretrainedConfig) -> int | None:
    """None for a window that no token of the context reaches the end of."""
    # transformers itself keeps everything for a window of 1 ([-0:]).
    if window is not None and (type(window) is not int or window < 2):
        raise BrokenCheckpointError(
            f"config.json: sliding_window is {str(window)[:40]}, not a whole number above 1; give 2 or more, or null "
            "for no window"
        )
    return window if window and window < config.max_position_embeddings else None


@dataclass(frozen=True)
class Architecture:
    """One decoder architecture of transformers.

    Attributes:
        model_type: as config.json says it.
        name: as people write it.
        modeling: transformers' module, whose mask functions the export replaces while it traces.
        model: the class of the model with its head.
        rotary: the class of the rotary embedding, from which the tables come.
        windows: the configuration's attention windows.
        head_norms: whether queries and keys have a QK norm: an RMSNorm over each head, before they are rotated.
    """

    model_type: str
    name: str
    modeling: Any
    model: type
    rotary: type
    windows: Callable[[PretrainedConfig], Windows] = lambda config: every_layer(None, config)
    head_norms: bool = False

    @property
    def class_name(self) -> str:
        """Of transformers' model."""
        return self.model.__name__

    @property
    def layer_norms(self) -> tuple[str, ...]:
        """Norms of a layer, as its tensors call them."""
        return (*NORMS, *(HEAD_NORMS if self.head_norms else ()))

    def require(self, config: PretrainedConfig) -> None:
        """Refuse, by name, a configuration that the fused export would get wrong.

        Raises:
            UnsupportedModelError: an activation, a rotary scheme or a head size that the graph does not have.
            BrokenCheckpointError: attention windows that make no sense.
        """
        if config.hidden_act not in ("silu", "swish"):
            raise UnsupportedModelError(
                f"activation {config.hidden_act!r} is not supported: {self.name} uses 'silu'; {_PLAIN}"
            )
        rope = rope_of(config)["rope_type"]
        if rope not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"rope scaling {rope!r} is not supported, only what one table of positions can hold "
                f"({', '.join(ROPE_TYPES)}); {_PLAIN}"
            )
        if head_dim_of(config) % 16 != 0:
            raise UnsupportedModelError(
                f"head size {head_dim_of(config)} is not a multiple of 16, which rotary GroupQueryAttention requires; "
                f"{_PLAIN}"
            )
        if getattr(config, "pretraining_tp", 1) not in (None, 1):
            raise UnsupportedModelError("pretraining_tp > 1 splits the matrix products; set it to 1 in config.json")
        self.windows(config)

    def require_tensors(self, names: Iterable[str]) -> None:
        """Refuse a model whose layers hold tensors that the graph would not use.

        Raises:
            UnsupportedModelError: names the tensors.
        """
        known = {f"{m}.{kind}" for m in MATRICES for kind in ("weight", "bias")}
        known |= {f"{norm}.weight" for norm in self.layer_norms}
        known_outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        strange = [
            n
            for n in names
            if (n.split(".", 3)[3] not in known if n.startswith("model.layers.") else n not in known_outside)
        ]
        if strange:
            raise UnsupportedModelError(
                f"transformers' {self.class_name} has tensors that the fused graph would not use: "
                f"{', '.join(strange[:3])}; use --target plain, or another version of transformers"
            )

    def attention_window(self, config: PretrainedConfig) -> int | None:
        """The window of the layers that have one, None where none has."""
        return next((w for w in self.windows(config) if w is not None), None)
