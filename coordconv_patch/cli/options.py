"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordconv_patch.cli.console import be_quiet, be_verbose
from coordconv_patch.lowering.registry import LOWERINGS

Model = Annotated[
    str, typer.Argument(help="timm:NAME, torchvision:NAME, hf:NAME, FILE.py:FUNCTION, .pt2")
]
Sites = Annotated[list[str] | None, typer.Option("--where", "-w", help="Sites; repeatable.")]
CoordsName = Annotated[
    str, typer.Option("--coords", help="paper, reference, mkocabas, solo or paddledetection.")
]
Radius = Annotated[bool, typer.Option("--radius", help="Add the channel r.")]
Shape = Annotated[str | None, typer.Option("--input", help="Example shape, such as 1,3,224,224.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights: safetensors, or a torch file of tensors alone.")
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Load a .pt2 file, which can run any code: do you know it?")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Download the zoo's weights.")]
CoordWeights = Annotated[
    Path | None, typer.Option("--coord-weights", help="A file of save_coords; sets the sites.")
]
LoweringName = Annotated[
    str, typer.Option("--lowering", help=f"auto, autotune, {', '.join(LOWERINGS)}.")
]
TargetName = Annotated[
    str,
    # Written out, since the targets are in modules that need ONNX.
    typer.Option(
        "--target",
        help="What the file is for: onnxruntime, openvino, opencv, tensorrt, ncnn, mnn, litert, "
        "coreml, web, portable.",
    ),
]
Provider = Annotated[list[str] | None, typer.Option("--provider", help="Execution provider.")]
DisabledOptimizers = Annotated[
    list[str] | None,
    typer.Option("--disable-optimizer", help="ONNX Runtime optimizer to leave out; repeatable."),
]
Tolerance = Annotated[float, typer.Option(help="Relative to the largest output.")]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Tell what is done, and why.", callback=be_verbose),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Tell errors alone.", callback=be_quiet)]
