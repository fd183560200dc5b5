"""One folder under several ONNX Runtimes: is it still the same model there, and where does it differ?"""
