"""Whether a patched model's ONNX file agrees with torch as well as the plain model's does."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.errors import CoordConvPatchError, ExportError
from zoo.entry import Entry
from zoo.running import build, fill_coords_, in_double, relative_difference, run, split, tensors

__all__ = ["AGREES", "check_in_onnx"]

AGREES = 1e-4
"""A plain export agrees with torch up to this, relative to the largest output."""

_OTHER_FUNCTION = 0.1
"""Outputs that differ by more of the largest one are not rounded, but others."""
_STRENGTHS = (0.3, 0.1, 0.03, 0.01)
"""Of the coordinate weights, relative to the convolution's own."""
_MEANINGFUL_NOISE = 5e-3
"""Where strong coordinates make a random network magnify rounding to more than this, no
difference means anything, and weaker ones are tried."""


def check_in_onnx(entry: Entry) -> dict[str, Any]:
    """Export the plain model; where it agrees with torch, export the patched one, too.

    By the first of torch's exporters that can; the plain model with a fixed batch, the
    patched one, with non-zero coordinate weights, with a dynamic batch where that is possible.
    """
    if entry.kills_exporter:
        return {"plain": entry.kills_exporter}
    try:
        model = build(entry)
        run(model, entry.example(training=False))
    except Exception as error:
        return {"plain": _line(error)}
    with tempfile.TemporaryDirectory() as directory:
        return _Comparison(entry, model, Path(directory)).row()


class _Comparison:
    def __init__(self, entry: Entry, model: nn.Module, directory: Path) -> None:
        self.entry = entry
        self.model = model
        self.directory = directory
        self.figures: dict[str, Any] = {}

    def inputs(self) -> Any:
        return self.entry.example(training=False)

    def row(self) -> dict[str, Any]:
        failure = self._plain()
        if failure:
            return self.figures | {"plain": failure}
        try:
            self._patched()
        except Exception as error:
            return self.figures | {"patched": _line(error, 1500)}
        return self.figures

    def _plain(self) -> str:
        """Export the plain model and compare it; returns why it cannot be a yardstick."""
        path = self.directory / "plain.onnx"
        expected = run(self.model, self.inputs(), seed=1)
        if relative_difference(expected, run(self.model, self.inputs(), seed=2)):
            return "draws random numbers in evaluation"
        self.figures["plain_noise"] = noise = _noise(self.model, self.inputs())
        started = time.perf_counter()
        try:
            self.figures["plain_exporter"] = _export(self.model, self.inputs(), path)
        except Exception as error:
            return f"does not export: {error}"
        self.figures["plain_seconds"] = round(time.perf_counter() - started, 1)
        found = self._difference(expected, path)
        if isinstance(found, str):
            return found
        if found > max(AGREES, 3 * noise):
            self.figures["plain_difference_all_optimizers"] = found
            found = self._difference(expected, path, ["Pad_Fusion"])
            assert not isinstance(found, str)
            self.figures["disabled_optimizers"] = ["Pad_Fusion"]
        self.figures["plain_difference"] = found
        if found > max(AGREES, 3 * noise):
            return f"disagrees with ONNX Runtime by {found:.2g} of the largest output"
        return ""

    def _difference(
        self, expected: list[Tensor], path: Path, disabled: list[str] | None = None
    ) -> float | str:
        try:
            return relative_difference(expected, _run_file(path, self.inputs(), disabled or []))
        except Exception as error:
            return f"ONNX Runtime refuses the plain export: {_line(error)}"

    def _patched(self) -> None:
        patched = ccp.patch(self.model, "all", example_inputs=self.inputs())
        for strength in _STRENGTHS:
            fill_coords_(patched, strength)
            self.figures["noise"] = _noise(patched, self.inputs())
            if self.figures["noise"] < _MEANINGFUL_NOISE:
                break
        if strength != _STRENGTHS[0]:
            self.figures["strength"] = strength
        path = self.directory / "patched.onnx"
        disabled = self.figures.get("disabled_optimizers", [])
        started = time.perf_counter()
        try:
            report = self._export_patched(patched, path, dynamic_batch=True)
        except CoordConvPatchError as error:
            reason = _line(error)
            self.figures["fixed_batch"] = re.sub(r"/\S*patched\.onnx", "the file", reason)
            report = self._export_patched(patched, path, dynamic_batch=False)
        self.figures["seconds"] = round(time.perf_counter() - started, 1)
        self.figures["exporter"] = report.exporter
        self.figures["size_mb"] = round(report.file_size / 1e6, 2)
        expected = run(patched, self.inputs())
        difference = relative_difference(expected, _run_file(path, self.inputs(), disabled))
        if difference > _OTHER_FUNCTION:
            # A detection or a key point between two equal maxima jumps by rounding: matched, it
            # is told from a wrong one, which keeps its difference.
            with contextlib.suppress(ExportError):
                check = ccp.verify_onnx(
                    patched,
                    path,
                    self.inputs(),
                    providers=["CPUExecutionProvider"],
                    disabled_optimizers=disabled,
                )
                difference, self.figures["unstable"] = check.difference, check.unstable
        self.figures["difference"] = difference

    def _export_patched(
        self, patched: nn.Module, path: Path, *, dynamic_batch: bool
    ) -> ccp.ExportReport:
        report = ccp.export_onnx(
            patched,
            path,
            self.inputs(),
            dynamic_batch=dynamic_batch,
            providers=["CPUExecutionProvider"],
            tolerance=1e9,  # the difference is wanted, whatever it is
            disabled_optimizers=self.figures.get("disabled_optimizers", []),
        )
        # At the example's own batch size a difference is ours; at others a trace may know one only.
        if any(check.difference > _OTHER_FUNCTION for check in report.checks[1:]):
            raise ExportError("the graph computes something else at another batch size")
        return report


def _noise(model: nn.Module, inputs: Any) -> float:
    """The model's rounding noise: how far other roundings of it are from float32.

    In float64, and with weights moved by one unit in the last place, which an ill-conditioned
    network (random weights, many layers) magnifies; 0 where neither can be computed.
    """
    expected = run(model, inputs)
    found = [0.0]
    with contextlib.suppress(Exception):
        found.append(
            relative_difference(run(copy.deepcopy(model).double(), in_double(inputs)), expected)
        )
    generator = torch.Generator().manual_seed(0)
    with contextlib.suppress(Exception), torch.no_grad():
        for _ in range(4):
            moved = copy.deepcopy(model)
            for parameter in moved.parameters():
                sign = torch.randint(-1, 2, parameter.shape, generator=generator)
                parameter.mul_(1 + sign * torch.finfo(parameter.dtype).eps)
            found.append(relative_difference(run(moved, inputs), expected))
    return max(value for value in found if value < 1)  # more is another decision, not rounding


def _export(model: nn.Module, inputs: Any, path: Path) -> str:
    """Export with torch.export, else with TorchScript; returns the one that did it.

    Raises:
        RuntimeError: If neither can, with both reasons.
    """
    args, kwargs = split(inputs)
    reasons = []
    for exporter, dynamo in (("dynamo", True), ("torchscript", False)):
        try:
            with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
                if dynamo:
                    program = torch.onnx.export(
                        model, args, kwargs=kwargs, dynamo=True, verbose=False
                    )
                    assert program is not None
                    program.save(str(path))
                else:
                    torch.onnx.export(
                        model, (*args, kwargs) if kwargs else args, str(path), dynamo=False
                    )
            return exporter
        except Exception as error:
            reasons.append(f"{exporter}: {_line(_root(error))}")
    raise RuntimeError("; ".join(reasons))


def _run_file(path: Path, inputs: Any, disabled: list[str]) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )
    args, kwargs = split(inputs)
    feeds = [tensor.numpy() for tensor in tensors([list(args), kwargs])]
    names = [value.name for value in session.get_inputs()]
    outputs = session.run(None, dict(zip(names, feeds, strict=True)))
    return [torch.as_tensor(output) for output in outputs]


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(error: BaseException, limit: int = 300) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}")
    return " ".join(text.split())[:limit]
