"""Messages in the words of the command line."""

from __future__ import annotations

import pytest

from coordconv_patch.cli.commands import app  # noqa: F401  the options below are its own
from coordconv_patch.cli.wording import in_options


@pytest.mark.parametrize(
    ("python", "options"),
    [
        ("where='entri' matches no", "--where 'entri' matches no"),
        ("write where=['a', 'b.c']", "write --where a --where b.c"),
        ("try another lowering= or exporter=", "try another --lowering or --exporter"),
        (
            'pass disabled_optimizers=["Pad_Fusion"] here and to onnxruntime.InferenceSession',
            "pass --disable-optimizer Pad_Fusion here, and the same to ONNX Runtime",
        ),
        ("opset=3: write a number", "--opset 3: write a number"),
        (
            "pass opset=18 or None, or exporter='torchscript' (7 to 20)",
            "pass --opset 18 or leave it out, or --exporter 'torchscript' (7 to 20)",
        ),
        ("pass dynamic_batch=False", "pass --static-batch"),
        ("at no other size: pass dynamic_size=False", "at no other size: leave --dynamic-size out"),
        ("write dynamic_size=True, or", "write --dynamic-size, or"),
        ("Pass example_inputs=..., or", "Pass --input SHAPE, or"),
        ("check_base=False loads", "in Python, load_coords(..., check_base=False) loads"),
        (
            "Name them in where=... if meant; where=lambda site: not site.x leaves such out",
            "Name them in --where if meant",
        ),
        ("providers=['X']: this", "--provider X: this"),
        ("x['where'] and somewhere=3", "x['where'] and somewhere=3"),
    ],
)
def test_arguments_become_options(python: str, options: str) -> None:
    assert in_options(python) == options
