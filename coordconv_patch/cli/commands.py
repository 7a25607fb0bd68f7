"""The command line, ``coordconv-patch``."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from torch import nn

from coordconv_patch.bench.bench import bench_onnx
from coordconv_patch.bench.picture import check_picture, draw_bench
from coordconv_patch.cli.sources import LoadedModel, load_checkpoint_, load_model, parse_shape
from coordconv_patch.errors import (
    ArgumentError,
    CoordConvPatchError,
    ExportError,
    PatchError,
    first_line,
)
from coordconv_patch.export.exporters import check_exporter
from coordconv_patch.export.onnx import export_onnx
from coordconv_patch.export.opset import check_opset
from coordconv_patch.files.atomic import obstacle_to_writing, replacing
from coordconv_patch.layers.coordconv import coord_layers
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.lowering.lower import LOWERINGS
from coordconv_patch.patching.patch import patch
from coordconv_patch.patching.plan import plan, survey
from coordconv_patch.running.inputs import split_inputs, takes_image_list
from coordconv_patch.runtime.providers import working_providers
from coordconv_patch.verification.verify import torch_outputs, verify_onnx
from coordconv_patch.version import __version__
from coordconv_patch.weights.save_load import load_coords, save_coords

__all__ = ["app", "main"]

_EPILOG = """
Models: timm:resnet50, torchvision:retinanet_resnet50_fpn, path/to/file.py:function, model.pt2.

Sites (--where, repeatable): first, all, stem, neck, head, a name, a glob such as 'layer1.*.conv1',
re:REGEX, or NAME@0,3: of a convolution that is called several times, those calls alone. A model.pt2
that is patched already keeps its sites if there is no --where; it needs --trust, because torch runs
code from such a file when it loads it.

Exit codes: 0 done; 1 the work failed or the outputs differ; 2 the command or its input was wrong.
"""

app = typer.Typer(
    help="Give a trained convolutional model coordinates, without changing its outputs.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
_console = Console()
_errors = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME, FILE.py:FUNCTION, .pt2")]
Where = Annotated[list[str] | None, typer.Option("--where", "-w", help="Sites; repeatable.")]
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
Provider = Annotated[list[str] | None, typer.Option("--provider", help="Execution provider.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command("plan", epilog="Example: coordconv-patch plan timm:resnet50 --where 'layer1.*.conv2'")
def plan_command(
    model: Model,
    where: Where = None,
    coords: CoordsName = "paper",
    radius: Radius = False,
    input_shape: Shape = None,
    trust: Trust = False,
    chosen_only: Annotated[bool, typer.Option("--chosen", help="Only the chosen sites.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which convolutions would get coordinates, and what that costs. Changes nothing."""
    loaded = _loaded(model, False, input_shape, trust)
    convention = Coordinates.preset(coords, radius=radius)
    if coord_layers(loaded.model) and not where:
        decided = survey(loaded.model, convention, loaded.example_inputs)
    else:
        decided = plan(
            loaded.model,
            where or "first",
            coords=convention,
            example_inputs=loaded.example_inputs,
        )
    if as_json:
        print(json.dumps(decided.to_dict(), indent=1))
        return
    # A pipe or a file has no width of its own; a table cut at 80 columns is of no use there.
    console = _console if sys.stdout.isatty() else Console(width=10_000)
    console.print(decided.table(chosen_only=chosen_only))


@app.command(
    "patch", epilog="Example: coordconv-patch patch timm:resnet50 --out coords.safetensors"
)
def patch_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="coords.safetensors, or a program .pt2")],
    where: Where = None,
    coords: CoordsName = "paper",
    radius: Radius = False,
    input_shape: Shape = None,
    trust: Trust = False,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    coord_weights: CoordWeights = None,
) -> None:
    """Patch a model, check that its outputs stay bit for bit, and write the result.

    A .safetensors file gets the coordinate weights (zero still), for load_coords on
    the same model; a .pt2 file the whole patched model as a torch.export program, in
    the mode and with the dynamic axes of the .pt2 file that it was made from. Of a
    .pt2 file that is patched already, or with --coord-weights, the weights are trained
    ones, and outputs are not compared.
    """
    if out.suffix not in (".safetensors", ".pt2"):
        raise ArgumentError(f"--out {out}: write a name that ends in .safetensors or .pt2")
    obstacle = obstacle_to_writing(out)
    if obstacle:
        raise ArgumentError(obstacle)
    loaded = _loaded(model, pretrained, input_shape, trust)
    if checkpoint is not None and coord_weights is None:
        load_checkpoint_(loaded.model, checkpoint)
    if coord_weights is not None or (coord_layers(loaded.model) and not where):
        patched = _with_weights(loaded, where, coords, radius, checkpoint, coord_weights)
        result = f"{len(coord_layers(patched))} convolutions with their coordinate weights"
    else:
        patched = _patched(loaded, where, coords, radius)
        result = f"patched {len(coord_layers(patched))} convolutions; {_compared(loaded, patched)}"
    if out.suffix == ".pt2":
        _save_program(patched, loaded, out)
    else:
        save_coords(patched, out)
    _console.print(f"{result}; wrote {out}")


@app.command(
    "export", epilog="Example: coordconv-patch export timm:resnet50 --out r50.onnx --where first"
)
def export_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    where: Where = None,
    coords: CoordsName = "paper",
    radius: Radius = False,
    input_shape: Shape = None,
    trust: Trust = False,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    coord_weights: CoordWeights = None,
    static_batch: Annotated[bool, typer.Option("--static-batch", help="Fix the batch.")] = False,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Any image size.")] = False,
    lowering: LoweringName = "auto",
    opset: Annotated[int | None, typer.Option(help="ONNX operator set, from 7 on.")] = None,
    exporter: Annotated[str, typer.Option(help="auto, dynamo or torchscript.")] = "auto",
    provider: Provider = None,
    tolerance: Annotated[float, typer.Option(help="Relative to the largest output.")] = 1e-4,
) -> None:
    """Export to ONNX; run the file in ONNX Runtime and compare with torch before it is kept."""
    check_exporter(exporter)
    check_opset(opset, exporter)
    loaded = _loaded(model, pretrained, input_shape, trust)
    patched = _with_weights(loaded, where, coords, radius, checkpoint, coord_weights)
    report = export_onnx(
        patched,
        out,
        loaded.example_inputs,
        dynamic_batch=not (
            static_batch or loaded.batch_is_fixed or takes_image_list(loaded.example_inputs)
        ),
        dynamic_size=dynamic_size,
        lowering=lowering,  # type: ignore[arg-type]  # checked there
        opset=opset,
        exporter=exporter,  # type: ignore[arg-type]
        providers=provider,
        tolerance=tolerance,
    )
    _console.print(report.table())


@app.command(
    "verify", epilog="Example: coordconv-patch verify timm:resnet50 r50.onnx --checkpoint r50.pth"
)
def verify_command(
    model: Model,
    onnx_file: Annotated[Path, typer.Argument(help="The ONNX file.")],
    where: Where = None,
    coords: CoordsName = "paper",
    radius: Radius = False,
    input_shape: Shape = None,
    trust: Trust = False,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    coord_weights: CoordWeights = None,
    provider: Provider = None,
    tolerance: Annotated[float, typer.Option(help="Relative to the largest output.")] = 1e-4,
) -> None:
    """Compare an ONNX file, as ONNX Runtime runs it, with the torch model."""
    if not onnx_file.is_file():
        raise ArgumentError(f"there is no file {onnx_file}")
    loaded = _loaded(model, pretrained, input_shape, trust)
    patched = _with_weights(loaded, where, coords, radius, checkpoint, coord_weights)
    check = verify_onnx(
        onnx_file, patched, loaded.example_inputs, providers=provider, tolerance=tolerance
    )
    _console.print(
        f"{onnx_file} agrees with torch on {check.inputs}: differs by {check.difference:.2g} of "
        f"the largest output ({working_providers(provider)[0]})"
    )


@app.command(
    "bench", epilog="Example: coordconv-patch bench timm:resnet50 --where all --batch 1 --batch 4"
)
def bench_command(
    model: Model,
    where: Where = None,
    input_shape: Shape = None,
    trust: Trust = False,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; repeatable. [default: 1]")
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=0, help="CPU threads, 0: ONNX Runtime's choice; repeatable. [default: 0]"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each variant.")] = 30,
    lowering: Annotated[
        list[str] | None, typer.Option(help="Lowering; repeatable. [default: all]")
    ] = None,
    provider: Provider = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the ratios: a .png file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the plain model, the patched one in each lowering, and naive concatenation.

    On every execution provider that works here; the variants take turns. What is printed is
    Markdown: paste it into an issue as it is.
    """
    if picture is not None:
        check_picture(picture)
    loaded = _loaded(model, False, input_shape, trust)
    example, batches = _batches_of(loaded, batch or [1])
    patched = _patched(loaded, where, "paper", False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in coord_layers(patched).values():
            layer.coord_weight.normal_(std=0.01, generator=generator)
    report = bench_onnx(
        patched,
        example,
        lowerings=lowering,
        providers=provider,
        batches=batches,
        threads=threads or [0],
        repeats=repeats,
    )
    command = shlex.join(["coordconv-patch", *sys.argv[1:]])
    if picture is not None:
        draw_bench(report, picture, subject=model)
    if as_json:
        print(json.dumps({"model": model, "command": command} | report.to_dict(), indent=1))
    else:
        print(report.markdown(subject=model, command=command))


@app.command("demo", epilog="Example: coordconv-patch demo --out coordconv-demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("coordconv-demo"),
    seed: Annotated[int, typer.Option(help="Seed of data, heads and batches.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only.")] = False,
) -> None:
    """Patch a pretrained EfficientNet-Lite0, fine-tune it, export it, run it: a few minutes."""
    # Imported here: the demo's packages are an extra.
    from coordconv_patch.demo import run_demo

    run_demo(out, quick=quick, seed=seed)


def _loaded(source: str, pretrained: bool, input_shape: str | None, trusted: bool) -> LoadedModel:
    shape = parse_shape(input_shape) if input_shape else None
    return load_model(source, pretrained=pretrained, input_shape=shape, trusted=trusted)


def _batches_of(loaded: LoadedModel, batches: list[int]) -> tuple[Any, list[int] | None]:
    """Example inputs, and batch sizes to repeat them to; ``None`` where only their own runs."""
    example = loaded.example_inputs
    image = example[0] if isinstance(example, tuple) and len(example) == 1 else example
    if not isinstance(image, torch.Tensor):
        if batches != [1]:
            raise ArgumentError(f"--batch {batches[-1]}: the model takes more than one tensor")
        return example, None
    if not loaded.batch_is_fixed:
        return image, batches
    if batches != [len(image)]:
        wrong = next((batch for batch in batches if batch != len(image)), batches[0])
        raise ArgumentError(
            f"--batch {wrong}: the program was exported for batches of {len(image)} alone"
        )
    return (image,), None


def _patched(loaded: LoadedModel, where: list[str] | None, coords: str, radius: bool) -> nn.Module:
    if coord_layers(loaded.model) and not where:
        return loaded.model
    return patch(
        loaded.model,
        where or "first",
        coords=Coordinates.preset(coords, radius=radius),
        example_inputs=loaded.example_inputs,
    )


def _with_weights(
    loaded: LoadedModel,
    where: list[str] | None,
    coords: str,
    radius: bool,
    checkpoint: Path | None,
    coord_weights: Path | None,
) -> nn.Module:
    """The model to export: patched by --where or by a file, with the checkpoint's weights."""
    if coord_weights is not None:
        if where:
            raise ArgumentError(
                "--where and --coord-weights exclude each other: the file names the sites"
            )
        if checkpoint is not None:
            load_checkpoint_(loaded.model, checkpoint)
        return load_coords(loaded.model, coord_weights)
    patched = _patched(loaded, where, coords, radius)
    if checkpoint is not None:
        load_checkpoint_(patched, checkpoint)
    elif not loaded.trained:
        _errors.print("[yellow]note:[/] the weights are random; pass --pretrained or --checkpoint")
    return patched


def _compared(loaded: LoadedModel, patched: nn.Module) -> str:
    """What was found equal between the plain and the patched model; raises if they differ."""
    before = torch_outputs(loaded.model, loaded.example_inputs)
    after = torch_outputs(patched, loaded.example_inputs)
    equal = len(before) == len(after) and all(map(torch.equal, before, after))
    if not equal:
        raise PatchError("the patched model's outputs are not those of the plain model")
    numbers = sum(tensor.numel() for tensor in after)
    return f"{len(after)} outputs ({numbers:,} numbers) are bit-equal"


def _save_program(model: nn.Module, loaded: LoadedModel, path: Path) -> None:
    args, kwargs = split_inputs(loaded.example_inputs)
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=loaded.dynamic_shapes)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot export this model ({first_line(error)}): write a .safetensors "
            "file instead"
        ) from error
    saved = io.BytesIO()  # torch tells a full disk by a RuntimeError
    torch.export.save(program, saved)
    with replacing(path, ExportError) as temporary:
        temporary.write_bytes(saved.getbuffer())


def main() -> None:
    """Run the command line; a user's mistake gets a message and an exit code, no traceback."""
    try:
        app()
    except (ExportError, PatchError) as error:
        _errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)
    except CoordConvPatchError as error:
        _errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
