"""ONNX Runtime: providers, binding, timing."""
