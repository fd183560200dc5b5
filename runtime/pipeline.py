"""A session as the model of ``transformers.pipeline("text-generation", model=..., tokenizer=...)``.

What the pipeline asks of a model (``config``, ``generation_config``, ``device``, ``generate``) is answered here by a
thin shell around a session; the tokens come from :func:`runtime.generate.generate`. Options that it does not know are
errors, never ignored. Try::

    model, tokenizer = runtime.load(folder), AutoTokenizer.from_pretrained(folder)
    print(pipeline("text-generation", model=model, tokenizer=tokenizer)("The capital of France is"))
"""

from __future__ import annotations

import copy
import math
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from export.manifest import Manifest, first_line
from export.spelling import fill_defaults
from runtime.errors import SessionError
from runtime.generate import generate
from runtime.sampling import Sampling
from runtime.session import Session, SessionInfo

DEFAULT_LENGTH = 20
"""GenerationConfig's own ``max_length``."""
# Settings of GenerationConfig that are carried out here, and those that have no say in what is answered without beams,
# assistants and an encoder, which are refused. Every other one has to stay at its default.
_CARRIED_OUT = (
    *("max_length", "max_new_tokens", "stop_strings", "eos_token_id", "pad_token_id", "bos_token_id"),
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"),
)
_NO_SAY = (
    *("early_stopping", "length_penalty", "diversity_penalty", "low_memory", "decoder_start_token_id"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"),
    *("use_cache", "cache_implementation", "cache_config", "return_legacy_cache", "prefill_chunk_size"),
    *("disable_compile", "remove_invalid_values", "renormalize_logits", "transformers_version", "_from_model_config"),
)
# Arguments of generate() that are about how PyTorch computes, or that the pipeline always hands over.
_HARMLESS = ("use_cache", "attention_mask", "tokenizer", "generation_config", "streamer")


class PreTrainedModel:
    """A base of this name is how ``transformers.pipeline`` tells that tensors are PyTorch's."""


class PipelineMixin(PreTrainedModel):
    """The attributes and the one method that ``TextGenerationPipeline`` uses; see :func:`runtime.load`."""

    folder: Path
    manifest: Manifest

    @property
    def info(self) -> SessionInfo:
        """What runs."""
        raise NotImplementedError

    framework = "pt"
    main_input_name = "input_ids"

    @cached_property
    def config(self) -> Any:
        """The checkpoint's configuration.

        Raises:
            SessionError: the folder has none that transformers reads.
        """
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        # The pipeline logs an error for classes that it does not find here.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("llama-onnx-session", type(self).__name__)
        try:
            return AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as e:
            raise SessionError(
                f"{self.folder} has no configuration for a pipeline ({first_line(e)}); export it again"
            ) from None

    @cached_property
    def generation_config(self) -> Any:
        """The folder's generation_config.json, else what follows from the configuration."""
        from transformers import GenerationConfig

        if (self.folder / "generation_config.json").is_file():
            config = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        else:
            config = GenerationConfig.from_model_config(self.config)
        config.eos_token_id = list(self.manifest.eos_token_ids) or None
        return config

    @property
    def name_or_path(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def device(self) -> Any:
        """Where the pipeline's tensors are; the session moves ids by itself."""
        import torch

        return torch.device("cpu")

    def can_generate(self) -> bool:
        """Asked by the pipeline."""
        return True

    def to(self, *_args: Any, **_options: Any) -> PipelineMixin:
        """Nothing to move: the session's provider was chosen when it was opened."""
        return self

    def _prepare_generation_config(
        self, generation_config: Any = None, use_model_defaults: bool | None = None, **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The pipeline's defaults under the model's own under the caller's, and the options that are none of these."""
        from transformers import GenerationConfig

        config = copy.deepcopy(generation_config if generation_config is not None else self.generation_config)
        untouched = GenerationConfig().to_dict()
        for name, value in self.generation_config.to_dict().items():
            if name in untouched and value != untouched[name] and getattr(config, name, None) == untouched[name]:
                setattr(config, name, value)
        return config, fill_defaults(config).update(**options)

    def generate(self, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> Any:
        """As transformers' ``generate``: ``[batch, longest prompt + new]`` int64, rows padded on the right.

        Args:
            input_ids: ``[batch, width]`` int64 tensor, padded on either side.
            attention_mask: ``[batch, width]``, 0 on padding; None where there is none.
            options: of ``GenerationConfig``; greedy and sampling, stop strings, ``streamer``.

        Raises:
            SessionError: an option that this runtime does not have, or no input.
        """
        import torch

        config, streamer = self._generation_options(options)
        if input_ids is None or input_ids.numel() == 0:
            raise SessionError("the prompt is empty; give some text")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
        width = input_ids.shape[1]
        room = self.info.longest_row - max(map(len, prompts))
        # transformers' own default counts new tokens, a length that somebody chose all of them.
        default = config.max_length in (None, DEFAULT_LENGTH) and "max_length" not in options
        length = (config.max_length or DEFAULT_LENGTH) - (0 if default else width)
        limit = config.max_new_tokens if config.max_new_tokens is not None else length
        eos, stops = [int(v) for v in _several(config.eos_token_id)], _several(config.stop_strings)
        done = generate(
            cast(Session, self),
            prompts,
            max(limit, 0) if config.max_new_tokens is not None else min(limit, room),
            eos,
            _sampling(config),
            stop_strings=stops,
            tokenizer=options.get("tokenizer") if stops else None,
        )
        if streamer is not None:
            streamer.put(input_ids)
            for token in done.tokens[0]:
                streamer.put(torch.tensor([token]))
            streamer.end()
        pad = config.pad_token_id if config.pad_token_id is not None else (eos or [0])[0]
        out = torch.full((len(prompts), max(map(len, done.tokens))), pad, dtype=torch.long)
        for row, tokens in enumerate(done.tokens):
            out[row, : len(tokens)] = torch.tensor(tokens)
        return torch.cat([input_ids.to(torch.long), out], dim=1)

    def _generation_options(self, options: dict[str, Any]) -> tuple[Any, Any]:
        """The generation's configuration, and the streamer."""
        from transformers import GenerationConfig

        config = copy.deepcopy(options.get("generation_config") or self.generation_config)
        given = {k: v for k, v in options.items() if k not in _HARMLESS}
        unknown = sorted(k for k in given if not hasattr(config, k))
        for name in unknown:
            if given[name] is not None:
                raise SessionError(f"generate() has no option {name!r} on an ONNX session; leave it out")
        fill_defaults(config).update(**given)
        for name, default in fill_defaults(GenerationConfig()).to_dict().items():
            value = getattr(config, name, default)
            neutral = value == default or not (value or default) or (name == "guidance_scale" and value == 1)
            if not neutral and name not in (*_CARRIED_OUT, *_NO_SAY):
                raise SessionError(f"{name}={value!r} is not supported on an ONNX session; leave it at {default!r}")
        return config, options.get("streamer")


def _several(value: Any) -> list[Any]:
    """None, one thing or several of them, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _sampling(config: Any) -> Sampling:
    """Our settings for transformers'; the seed comes from PyTorch's generator, so ``set_seed`` repeats a draw."""
    import torch

    penalty = 1.0 if config.repetition_penalty is None else float(config.repetition_penalty)
    if not config.do_sample:
        return Sampling(repetition_penalty=penalty)
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    if not temperature > 0 or math.isinf(temperature):
        raise SessionError(
            f"temperature {temperature} cannot be sampled with; use do_sample=False, or a number above 0"
        )
    return Sampling(
        temperature,
        int(config.top_k or 0),
        1.0 if config.top_p is None else float(config.top_p),
        penalty,
        seed=int(torch.randint(2**62, (1,)).item()),
    )
