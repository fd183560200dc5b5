"""RunRecord -> verdict -> HTML, Markdown, JSON and JUnit. Knows no model and no torch.

Try: ``llama-onnx report reports/out/record.json --out /tmp/page``.
"""
