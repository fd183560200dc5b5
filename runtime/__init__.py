"""ExportedModel -> Session -> tokens with time stamps, on ONNX Runtime or on PyTorch.

The only package that imports onnxruntime; takes nothing from ``export`` but ``export.manifest``.
Try: ``llama-onnx generate FOLDER "The capital of France is"``.
"""
