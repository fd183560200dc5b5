"""Checkpoint -> ExportedModel: a folder with ONNX graphs, weights and a manifest.

The only package that imports optimum. Nothing heavy is imported here, so that ``llama-onnx --help`` starts fast.
Try: ``llama-onnx export demo /tmp/demo-onnx``.
"""
