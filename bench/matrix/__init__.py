"""One folder under several ONNX Runtimes: is it still the same model there, how fast, and which version changed it?"""
