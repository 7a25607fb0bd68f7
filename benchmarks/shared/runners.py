"""Run ONNX files in one runtime. Needs NumPy and that runtime, and nothing else of this project.

So a runtime can stand in an environment of its own, where this script runs by itself; it writes
the first output of each file, and prints the seconds of each run, the files taking turns for so
many rounds and seconds at least:

    python benchmarks/shared/runners.py NAME ROUNDS SECONDS IMAGES.npy [FILE.onnx OUTPUT.npy ...]
"""

from __future__ import annotations

import atexit
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["RUNNERS", "Run", "main"]

Run = Callable[[], np.ndarray]
"""Computes the first output, in its order; raises what fails."""


def onnxruntime(path: Path, images: np.ndarray) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: images})[0]


def openvino(path: Path, images: np.ndarray) -> Run:
    return _openvino(path, images, fixed=True)


def openvino_dynamic(path: Path, images: np.ndarray) -> Run:
    """With the axes dynamic that are so in the file."""
    return _openvino(path, images, fixed=False)


def _openvino(path: Path, images: np.ndarray, fixed: bool) -> Run:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if fixed:
        model.reshape(list(images.shape))
    options = {
        "INFERENCE_NUM_THREADS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(model, "CPU", options)
    return lambda: compiled(images)[0]


def opencv(path: Path, images: np.ndarray) -> Run:
    return _opencv(path, images, "ENGINE_NEW")


def opencv_classic(path: Path, images: np.ndarray) -> Run:
    return _opencv(path, images, "ENGINE_CLASSIC")


def _opencv(path: Path, images: np.ndarray, engine: str) -> Run:
    import cv2

    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    network = cv2.dnn.readNetFromONNX(str(path), getattr(cv2.dnn, engine))

    def run() -> np.ndarray:
        network.setInput(images)
        return np.array(network.forward())

    return run


def mnn(path: Path, images: np.ndarray) -> Run:
    import MNN
    import MNN.nn

    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "model.mnn"
        # Not the command mnnconvert: it runs "pip install" for a package that reports its use.
        convert = "import sys, _tools; _tools.mnnconvert(sys.argv)"
        command = [sys.executable, "-c", convert, "-f", "ONNX", "--modelFile", str(path)]
        _called([*command, "--MNNModel", str(converted), "--bizCode", "x"])
        network = MNN.nn.load_module_from_file(str(converted), [], [])

    def run() -> np.ndarray:
        tensor = MNN.expr.const(images.tobytes(), list(images.shape), MNN.expr.NCHW)
        output = network.onForward([MNN.expr.convert(tensor, MNN.expr.NC4HW4)])[0]
        output = MNN.expr.convert(output, MNN.expr.NCHW)
        return np.array(output.read()).reshape(output.shape)

    return run


def ncnn(path: Path, images: np.ndarray) -> Run:
    """One image after the other: ncnn has no batch."""
    import ncnn

    network = ncnn.Net()
    network.opt.num_threads = 1
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):
        setattr(network.opt, name, False)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.onnx"
        copy.write_bytes(path.read_bytes())
        shape = ",".join(map(str, (1, *images.shape[1:])))
        _called([_beside("pnnx"), str(copy), f"inputshape=[{shape}]", "fp16=0"], folder)
        network.load_param(str(Path(folder) / "model.ncnn.param"))
        network.load_model(str(Path(folder) / "model.ncnn.bin"))

    def run() -> np.ndarray:
        outputs = []
        for image in images:
            extractor = network.create_extractor()
            extractor.input("in0", ncnn.Mat(np.ascontiguousarray(image)))
            outputs.append(np.array(extractor.extract("out0")[1]))
        return np.stack(outputs)

    return run


def litert(path: Path, images: np.ndarray) -> Run:
    """A file of fixed sizes; onnx2tf turns images to (N, H, W, C)."""
    from ai_edge_litert.interpreter import Interpreter

    with tempfile.TemporaryDirectory() as folder:
        # onnx2tf runs what it wrote on pictures that it would download otherwise.
        pictures = np.random.default_rng(0).random((20, 128, 128, 3), dtype=np.float32)
        np.save(Path(folder) / "calibration_image_sample_data_20x128x128x3_float32.npy", pictures)
        _called([_beside("onnx2tf"), "-i", str(path), "-o", folder, "-n"], folder)
        (converted,) = Path(folder).glob("*_float32.tflite")
        interpreter = Interpreter(model_content=converted.read_bytes(), num_threads=1)
    interpreter.allocate_tensors()
    given, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    turned = np.ascontiguousarray(images.transpose(0, 2, 3, 1))

    def run() -> np.ndarray:
        interpreter.set_tensor(given["index"], turned)
        interpreter.invoke()
        output = interpreter.get_tensor(result["index"])
        return output.transpose(0, 3, 1, 2) if output.ndim == 4 else output

    return run


_NODE_SCRIPT = """
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
const [modules, model, input, shape, output] = process.argv.slice(2);
const ort = createRequire(modules + "/")("onnxruntime-web");
ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(model)));
const bytes = readFileSync(input);
const start = bytes.byteOffset;
const data = new Float32Array(bytes.buffer.slice(start, start + bytes.length));
const tensor = new ort.Tensor("float32", data, JSON.parse(shape));
for await (const line of createInterface({ input: process.stdin })) {
  const results = await session.run({ [session.inputNames[0]]: tensor });
  const { data: numbers, dims } = results[session.outputNames[0]];
  const { buffer, byteOffset, byteLength } = numbers;
  writeFileSync(output, Buffer.from(buffer, byteOffset, byteLength));
  console.log(JSON.stringify(dims));
}
"""


def web(path: Path, images: np.ndarray) -> Run:
    """ONNX Runtime's WebAssembly, in node; ``node_modules`` lies in the environment's folder."""
    folder = Path(tempfile.mkdtemp())
    (folder / "run.mjs").write_text(_NODE_SCRIPT, encoding="utf-8")
    (folder / "in.bin").write_bytes(images.tobytes())
    files = [str(path), str(folder / "in.bin"), json.dumps(images.shape), str(folder / "out.bin")]
    process = subprocess.Popen(
        ["node", str(folder / "run.mjs"), str(Path(sys.executable).parents[1]), *files],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def run() -> np.ndarray:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"node: {process.communicate()[1].strip()[-800:]}")
        return np.fromfile(folder / "out.bin", dtype=np.float32).reshape(json.loads(line))

    return run


def chromium(path: Path, images: np.ndarray) -> Run:
    """The same in a browser."""
    from browser import Browser  # beside this script

    opened = Browser(Path(sys.executable).parents[1], path, images)
    atexit.register(opened.close)
    return opened.run


def tract(path: Path, images: np.ndarray) -> Run:
    import tract as library

    runnable = library.onnx().load(str(path)).into_model().into_runnable()
    return lambda: runnable.run([images])[0].to_numpy()


RUNNERS: dict[str, Callable[[Path, np.ndarray], Run]] = {
    each.__name__: each
    for each in (
        *(onnxruntime, openvino, openvino_dynamic, opencv, opencv_classic),
        *(mnn, ncnn, litert, web, chromium, tract),
    )
}
"""By name: loads a file for images (N, C, H, W); raises what fails."""


def _beside(command: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).with_name(command))


def _called(command: list[str], folder: str | None = None) -> None:
    ran = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    if ran.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {(ran.stderr or ran.stdout).strip()[-800:]}")


def main(arguments: list[str]) -> None:
    name, least_rounds, least_seconds, images, *files = arguments
    given: Any = np.load(images)
    runs = [RUNNERS[name](Path(path).resolve(), given) for path in files[::2]]
    for run, output in zip(runs, files[1::2], strict=True):
        np.save(output, run())
    seconds: list[list[float]] = [[] for _ in runs]
    turns = list(zip(runs, seconds, strict=True))
    end = time.perf_counter() + float(least_seconds)
    while len(seconds[0]) < int(least_rounds) or time.perf_counter() < end:
        random.shuffle(turns)  # in one order, each finds the caches as the same other leaves them
        for run, times in turns:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
