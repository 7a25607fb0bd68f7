"""The least that constant maps cost in ONNX Runtime: what adding one per convolution takes.

The plain model, as ONNX Runtime optimised it for one batch size, gets a constant into the
``Sum`` input of each chosen convolution: the kernel adds it while its result is still in
registers, in the layout that it computes in, so nothing but the reading of the constant is
added. Where that input holds a residual already, the constant is added to the residual.
No export can be faster that adds a map to each of these convolutions; only one that needs
fewer maps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from coordconv_patch.runtime.providers import CPU, make_session

__all__ = ["write_floor"]

_SUM = 3
"""Number of the input ``Sum`` (or ``Z``) of ONNX Runtime's own convolutions."""


def write_floor(plain: Path, path: Path, images: Tensor, selection: str) -> int:
    """Write the floor's graph, to be run without further optimisation.

    Args:
        plain: The plain model's ONNX file.
        path: The file to write.
        images: (N, C, H, W); the constants have this batch size.
        selection: ``"first"``, ``"k>1"`` or ``"all"``.

    Returns:
        Number of convolutions that got a constant.
    """
    model = _optimised(plain, path, images)
    shapes = _output_shapes(model, images)
    generator = np.random.default_rng(0)
    nodes: list[NodeProto] = []
    count = 0
    for node in model.graph.node:
        if not _is_convolution(node) or not _is_chosen(node, selection, count):
            nodes.append(node)
            continue
        count += 1
        constant = generator.normal(0, 1e-3, shapes[node.output[0]]).astype(np.float32)
        name = f"floor_constant_{count}"
        model.graph.initializer.append(numpy_helper.from_array(constant, name))
        nodes += _with_constant(node, name)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path.write_bytes(model.SerializeToString())
    return count


def _optimised(plain: Path, path: Path, images: Tensor) -> onnx.ModelProto:
    model = onnx.load(plain)
    for axis, length in enumerate(images.shape):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = length
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    return onnx.load(path)


def _output_shapes(model: onnx.ModelProto, images: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of every convolution's output, found by running the graph."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    outputs = [node.output[0] for node in model.graph.node if _is_convolution(node)]
    present = {value.name for value in watched.graph.output}
    watched.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in outputs
        if name not in present
    )
    session = make_session(watched.SerializeToString(), [CPU], graph_optimization=False)
    found = session.run(outputs, {session.get_inputs()[0].name: images.numpy()})
    return {name: array.shape for name, array in zip(outputs, found, strict=True)}


def _is_convolution(node: NodeProto) -> bool:
    return node.op_type in ("Conv", "FusedConv")


def _is_chosen(node: NodeProto, selection: str, already: int) -> bool:
    if selection == "first":
        return already == 0
    if selection == "all":
        return True
    kernel = next(
        attribute.ints for attribute in node.attribute if attribute.name == "kernel_shape"
    )
    return max(kernel) > 1


def _with_constant(node: NodeProto, constant: str) -> list[NodeProto]:
    if not node.domain:  # a plain Conv has no Sum; the fused one without activation is the same
        node.op_type, node.domain = "FusedConv", "com.microsoft"
    while len(node.input) <= _SUM:
        node.input.append("")
    residual = node.input[_SUM]
    if not residual:
        node.input[_SUM] = constant
        return [node]
    total = f"{constant}_and_residual"
    node.input[_SUM] = total
    return [helper.make_node("Add", [residual, constant], [total], f"{total}_add"), node]
