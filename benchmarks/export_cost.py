"""What an export with its verification costs, and how large the file is.

The time of ``export_onnx`` (by default with all convolutions patched; the file compared with
torch in ONNX Runtime) over that of ``torch.onnx.export`` of the plain model and loading it once
in ONNX Runtime. The two take turns.

    python benchmarks/export_cost.py
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shared.graphs import write_plainly, write_verified
from shared.models import MODELS, QUICK, BenchModel, images
from shared.record import make_parser, open_record, ratios_of
from shared.show import draw_ratios, print_ratios
from shared.variants import SELECTIONS, patched, seeded

from coordconv_patch.bench.report import markdown_table
from coordconv_patch.runtime.providers import CPU, make_session
from coordconv_patch.runtime.timing import alternate, median, ratio_of_medians

NAME = "export_cost"
PLAIN = "plain, torch.onnx.export and one load"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__ or "", tuple(name for name in MODELS if name != QUICK))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=["all"])
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.rounds = [QUICK], 1
    record = open_record(options, NAME)
    for name in [] if options.show else options.models:
        record.measure(name, _measure, MODELS[name], options)
    ratios = {MODELS[key].title: ratios_of(result) for key, result in record.results.items()}
    print_ratios(ratios)
    rows = []
    for key, result in record.results.items():
        sizes = [variant["file_size"] for variant in result["variants"].values()]
        for name, size in zip(list(result["variants"])[1:], sizes[1:], strict=True):
            growth = f"{size / sizes[0] - 1:+.2%}"
            rows.append((MODELS[key].title, name, f"{sizes[0] / 1e6:.2f}", growth))
    print()
    print("\n".join(markdown_table(("file size", "patched", "plain, MB", "growth"), rows)))
    draw_ratios({"": ratios}, "Export and verification over a plain export", options.picture)


def _measure(model: BenchModel, options: argparse.Namespace) -> dict[str, Any]:
    plain = seeded(model.make)
    example = images(2, model.size)
    with tempfile.TemporaryDirectory() as folder:
        files = {PLAIN: Path(folder) / "plain.onnx"}

        def export_and_load() -> None:
            write_plainly(plain, example, files[PLAIN])
            make_session(files[PLAIN], [CPU])

        runs: dict[str, Callable[[], None]] = {PLAIN: export_and_load}
        for selection in options.selections:
            files[selection] = Path(folder) / f"{len(files)}.onnx"
            made = patched(plain, SELECTIONS[selection], example)
            runs[selection] = functools.partial(write_verified, made, example, files[selection])
        seconds = alternate(runs, repeats=options.rounds, warm_up=0, description=model.title)
        variants = {}
        for name, times in seconds.items():
            ratio = ratio_of_medians(times, seconds[PLAIN])
            variants[name] = {
                "seconds": median(times),
                "ratio": ratio.value,
                "ratio_95": [ratio.low, ratio.high],
                "file_size": files[name].stat().st_size,
            }
    return {"rounds": options.rounds, "variants": variants}


if __name__ == "__main__":
    main()
