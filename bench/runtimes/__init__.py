"""Other ONNX Runtimes than this environment's: made by version, and a folder opened under one of them."""
