"""Checkpoint -> ExportedModel: a folder with ONNX graphs, weights and a manifest.

The only package that imports optimum. Nothing heavy is imported here, so that ``llama-onnx --help`` starts fast.
Try: ``llama-onnx export demo /tmp/demo-onnx``.
"""

import os

TELEMETRY_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Switches of libraries that report their use to their makers: onnxruntime (on by default in its Linux wheels from 1.29
on), huggingface_hub, datasets, Ray. Set here, because ``bench`` and ``runtime`` import this package before they load
any of them (afterwards it would be too late); what the user has set stays."""

for _name, _value in TELEMETRY_OFF.items():
    os.environ.setdefault(_name, _value)
