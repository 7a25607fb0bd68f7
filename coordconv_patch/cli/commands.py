"""The command line, ``coordconv-patch``."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from coordconv_patch.cli import options
from coordconv_patch.cli.checkpoint import load_checkpoint_
from coordconv_patch.cli.console import console, note, show
from coordconv_patch.cli.models import (
    batches_of,
    check_outputs_equal,
    loaded_model,
    model_to_export,
    patched_model,
    save_program,
)
from coordconv_patch.cli.ranked_task import ranked_task
from coordconv_patch.cli.sources import failures_told
from coordconv_patch.errors import ArgumentError, path_text
from coordconv_patch.files.atomic import obstacle_to_writing
from coordconv_patch.files.picture_file import check_picture
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.packages import require_packages
from coordconv_patch.patching.plan import plan, survey
from coordconv_patch.running.inputs import takes_image_list
from coordconv_patch.version import __version__
from coordconv_patch.weights.save_load import save_coords

__all__ = ["app"]

_EPILOG = """
Models: timm:resnet50, timm:resnet18?num_classes=12, timm:hf-hub:OWNER/NAME,
torchvision:retinanet_resnet50_fpn, hf:microsoft/resnet-18 (or hf:FOLDER),
path/to/file.py:function, model.pt2.

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
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command("plan", epilog="Example: coordconv-patch plan timm:resnet50 --where 'layer1.*.conv2'")
def plan_command(
    model: options.Model,
    where: options.Sites = None,
    coords: options.CoordsName = "paper",
    radius: options.Radius = False,
    input_shape: options.Shape = None,
    trust: options.Trust = False,
    sites: Annotated[bool, typer.Option("--sites", help="A row for each site.")] = False,
    chosen_only: Annotated[
        bool, typer.Option("--chosen", help="A row for each chosen site.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Show which convolutions would get coordinates, and what that costs. Changes nothing."""
    loaded = loaded_model(model, False, input_shape, trust)
    convention = Coordinates.preset(coords, radius=radius)
    if coord_layers(loaded.model) and not where:
        decided = survey(loaded.model, coords=convention, example_inputs=loaded.example_inputs)
    else:
        decided = plan(
            loaded.model, where or "first", coords=convention, example_inputs=loaded.example_inputs
        )
    if html is not None:
        decided.to_html(html)
    if as_json:
        print(json.dumps(decided.to_dict(), indent=1))
        return
    show(decided.by_site(chosen_only=chosen_only) if sites or chosen_only else decided)


@app.command(
    "patch",
    epilog="Example: coordconv-patch patch timm:resnet50 --pretrained --out coords.safetensors",
)
def patch_command(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="coords.safetensors, or a program .pt2")],
    where: options.Sites = None,
    coords: options.CoordsName = "paper",
    radius: options.Radius = False,
    input_shape: options.Shape = None,
    trust: options.Trust = False,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    coord_weights: options.CoordWeights = None,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
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
    loaded = loaded_model(model, pretrained, input_shape, trust)
    if checkpoint is not None and coord_weights is None:
        load_checkpoint_(loaded.model, checkpoint)
    if coord_weights is not None or (coord_layers(loaded.model) and not where):
        patched = model_to_export(loaded, where, coords, radius, checkpoint, coord_weights)
        result = f"{len(coord_layers(patched))} convolutions with their coordinate weights"
    else:
        patched = patched_model(loaded, where, coords, radius)
        equal = check_outputs_equal(loaded, patched)
        if not loaded.trained and checkpoint is None:
            note(
                "the weights are random, drawn anew by each command, so the file fits no other "
                "model; pass --pretrained or --checkpoint"
            )
        result = f"patched {len(coord_layers(patched))} convolutions; {equal}"
    if out.suffix == ".pt2":
        save_program(patched, loaded, out)
    else:
        save_coords(patched, out)
    console.print(f"{result}; wrote {out}")


@app.command(
    "export", epilog="Example: coordconv-patch export timm:resnet50 --pretrained --out r50.onnx"
)
def export_command(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    where: options.Sites = None,
    coords: options.CoordsName = "paper",
    radius: options.Radius = False,
    input_shape: options.Shape = None,
    trust: options.Trust = False,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    coord_weights: options.CoordWeights = None,
    static_batch: Annotated[bool, typer.Option("--static-batch", help="Fix the batch.")] = False,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Any image size.")] = False,
    lowering: options.LoweringName = "auto",
    opset: Annotated[int | None, typer.Option(help="ONNX operator set, from 7 on.")] = None,
    exporter: Annotated[str, typer.Option(help="auto, dynamo or torchscript.")] = "auto",
    provider: options.Provider = None,
    target: options.TargetName = "onnxruntime",
    tolerance: options.Tolerance = 1e-4,
    disable_optimizer: options.DisabledOptimizers = None,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Export to ONNX; run the file in ONNX Runtime and compare with torch before it is kept."""
    _require_onnx("export")
    from coordconv_patch.export.exporters import check_exporter
    from coordconv_patch.export.onnx import export_onnx
    from coordconv_patch.export.opset import check_opset
    from coordconv_patch.export.targets import target_named

    check_exporter(exporter)
    check_opset(opset, exporter)
    target_named(target)
    loaded = loaded_model(model, pretrained, input_shape, trust)
    patched = model_to_export(loaded, where, coords, radius, checkpoint, coord_weights)
    report = export_onnx(
        patched,
        out,
        loaded.example_inputs,
        dynamic_batch=not (
            static_batch or loaded.batch_is_fixed or takes_image_list(loaded.example_inputs)
        ),
        dynamic_size=dynamic_size,
        lowering=lowering,
        opset=opset,
        exporter=exporter,  # type: ignore[arg-type]  # checked there
        providers=provider,
        tolerance=tolerance,
        target=target,
        disabled_optimizers=disable_optimizer or (),
    )
    show(report)


@app.command(
    "verify", epilog="Example: coordconv-patch verify timm:resnet50 r50.onnx --checkpoint r50.pth"
)
def verify_command(
    model: options.Model,
    onnx_file: Annotated[Path, typer.Argument(help="The ONNX file.")],
    where: options.Sites = None,
    coords: options.CoordsName = "paper",
    radius: options.Radius = False,
    input_shape: options.Shape = None,
    trust: options.Trust = False,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    coord_weights: options.CoordWeights = None,
    provider: options.Provider = None,
    tolerance: options.Tolerance = 1e-4,
    disable_optimizer: options.DisabledOptimizers = None,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare an ONNX file, as ONNX Runtime runs it, with the torch model."""
    _require_onnx("verify")
    from coordconv_patch.runtime.providers import working_providers
    from coordconv_patch.verification.verify import verify_onnx

    if not os.path.isfile(onnx_file):
        raise ArgumentError(f"there is no file {path_text(onnx_file)}")
    loaded = loaded_model(model, pretrained, input_shape, trust)
    patched = model_to_export(loaded, where, coords, radius, checkpoint, coord_weights)
    check = verify_onnx(
        patched,
        onnx_file,
        loaded.example_inputs,
        providers=provider,
        tolerance=tolerance,
        disabled_optimizers=disable_optimizer or (),
    )
    console.print(
        f"{onnx_file} agrees with torch on {check.inputs}: differs by {check.difference:.2g} of "
        f"the largest output ({working_providers(provider)[0]})"
    )


@app.command(
    "bench", epilog="Example: coordconv-patch bench timm:resnet50 --where all --batch 1 --batch 4"
)
def bench_command(
    model: options.Model,
    where: options.Sites = None,
    input_shape: options.Shape = None,
    trust: options.Trust = False,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; repeatable. Default: 1.")
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=0, help="CPU threads, 0: ONNX Runtime's choice; repeatable. Default: 0."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each variant.")] = 30,
    lowering: Annotated[
        list[str] | None, typer.Option(help="Lowering; repeatable. Default: all.")
    ] = None,
    provider: options.Provider = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the ratios: a .png file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Time the plain model, the patched one in each lowering, and naive concatenation.

    On every execution provider that works here; the variants take turns. What is printed is
    Markdown: paste it into an issue as it is.
    """
    _require_onnx("bench")
    from coordconv_patch.bench.bench import bench_onnx
    from coordconv_patch.bench.picture import draw_bench

    if picture is not None:
        check_picture(picture)
    loaded = loaded_model(model, False, input_shape, trust)
    example, batches = batches_of(loaded, batch or [1])
    patched = patched_model(loaded, where, "paper", False)
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


@app.command("env", epilog="Example: coordconv-patch env")
def env_command() -> None:
    """Print versions, execution providers and the machine: paste it into an issue as it is."""
    from coordconv_patch.cli.environment import environment

    print(environment())


@app.command("rank", epilog="Example: coordconv-patch rank task.py:task --picture ranking.png")
def rank_command(
    task: Annotated[
        str, typer.Argument(help="FILE.py:FUNCTION, which returns model, batches, loss_fn")
    ],
    where: options.Sites = None,
    by: Annotated[str | None, typer.Option(help="site or stage. [default: as few rows]")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of the model's own weights.")] = 1e-3,
    coord_lr: Annotated[
        float | None, typer.Option(help="Of coordinate weights. [default: ten times --lr]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of a long run. [default: by cost]")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Long runs of each.")] = 2,
    picture: Annotated[Path | None, typer.Option(help="Draw the gains: a .png file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Rank convolutions, or stages of them, by what coordinates there take off a loss."""
    if picture is not None:
        check_picture(picture)
    from coordconv_patch.ranking.rank import rank

    asked = ranked_task(task)
    with failures_told(task, Path(task.rpartition(":")[0])):
        ranking = rank(
            *asked,
            where or "all",
            by=by,  # type: ignore[arg-type]  # checked there
            lr=lr,
            coord_lr=coord_lr,
            steps=steps,
            seeds=seeds,
        )
    if picture is not None:
        ranking.plot(picture)
    if as_json:
        print(json.dumps(ranking.to_dict(), indent=1))
        return
    show(ranking)


@app.command("demo", epilog="Example: coordconv-patch demo --out coordconv-demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("coordconv-demo"),
    seed: Annotated[int, typer.Option(help="Seed of data, heads and batches.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Patch a pretrained EfficientNet-Lite0, fine-tune it, export it, run it: a few minutes."""
    # Imported here: the demo's packages are an extra.
    from coordconv_patch.demo.run import run_demo

    run_demo(out, quick=quick, seed=seed)


def _require_onnx(command: str) -> None:
    """Raise a MissingPackageError if a command lacks what it works with, before it is imported."""
    purpose = f"coordconv-patch {command}"
    require_packages(purpose, "onnx", "onnx_ir", "onnxscript", "onnxruntime")
