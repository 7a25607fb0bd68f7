"""From a patched model to an ONNX file."""
