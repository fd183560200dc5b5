"""Which execution providers really load here: each runs a one-node model. Try: ``llama-onnx doctor``.

The list of available providers also names those whose libraries are missing, so nothing short of a run is believed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from runtime.errors import ProviderUnavailableError
from runtime.providers import PROVIDERS, provider_list, require, require_active


@dataclass(frozen=True)
class Finding:
    """One provider: whether it ran, and what to do if not."""

    provider: str
    loads: bool
    detail: str


def _one_node() -> bytes:
    """A model that adds its input to itself."""
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "one", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


def examine() -> list[Finding]:
    """Try every provider that this tool knows."""
    found = []
    model = _one_node()
    for name, provider in PROVIDERS.items():
        try:
            require(name, None)
            options = ort.SessionOptions()
            options.log_severity_level = 4
            session = ort.InferenceSession(model, sess_options=options, providers=provider_list(provider))
            require_active(session, provider)
            (y,) = session.run(None, {"x": np.ones(2, np.float32)})
            good = bool((y == 2).all())
            found.append(Finding(name, good, f"onnxruntime {ort.__version__}" if good else "gave a wrong result"))
        except ProviderUnavailableError as e:
            found.append(Finding(name, False, str(e)))
        except Exception as e:  # onnxruntime raises its own C++-bound classes
            found.append(Finding(name, False, f"{str(e).splitlines()[0][:200]}. To get it: {provider.install}"))
    return found
