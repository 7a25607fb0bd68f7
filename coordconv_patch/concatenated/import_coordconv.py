"""Import the concatenating CoordConvs of a model: the same outputs, with layers of this package."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from coordconv_patch.arguments import check_example_inputs, check_flag
from coordconv_patch.concatenated.example_images import GROWTHS, other_images, resized
from coordconv_patch.concatenated.module_probe import recognise_alone
from coordconv_patch.concatenated.recognition import Recognised, Recognition, RunPair, recognise
from coordconv_patch.concatenated.recorded_run import record
from coordconv_patch.concatenated.report import ImportedSite, ImportReport
from coordconv_patch.concatenated.rewrite import joins_of, rewrite_
from coordconv_patch.concatenated.same_outputs import OutputsBefore
from coordconv_patch.concatenated.sightings import may_be_rewritten
from coordconv_patch.errors import PatchError
from coordconv_patch.running.inputs import check_has_values, check_is_module
from coordconv_patch.running.rollback import ModuleStates
from coordconv_patch.running.untouched import LOOK, copied
from coordconv_patch.running.wrappers import check_not_wrapped

__all__ = ["import_coordconv", "import_coordconv_"]


def import_coordconv(
    model: nn.Module, example_inputs: Any = None, *, check: bool = True
) -> ImportReport:
    """A copy of a model whose concatenating CoordConvs are layers of this package.

    A convolution that sees an image and coordinate channels, ``conv(cat([x, c], 1))``, becomes a
    coordinate convolution of ``x`` with the same outputs; the coordinates are not concatenated
    any more. It does not matter how the model computes them: what counts are the values that
    reach the convolution, on images of two sizes, and on two images of each size.

    Args:
        model: The model, with its trained weights. It is run in evaluation mode.
        example_inputs: A tensor, or a tuple of positional arguments (a dict last is keyword
            arguments). The model is run on images of this size and of a larger one. ``None``:
            modules that join coordinates and one convolution are tried out alone; coordinates that
            a model concatenates in other code are not looked for.
        check: With example inputs, compare the outputs of the copy with the model's, on both
            sizes in evaluation mode and on one in training mode; they differ by rounding.

    Returns:
        The copy as ``.model``, and what was recognised.

    Warns:
        UserWarning: Of convolutions that see coordinates and are left as they are, with the
            reason, such as the largest deviation from any known convention; and of those seen at
            one size only, which may fit several conventions.

    Raises:
        PatchError: If there is nothing to import, the model cannot be run or copied, or
            outputs differ.
    """
    with LOOK:
        findings = _findings(model, example_inputs, check)
        return _import_(copied(model, advice="use import_coordconv_"), findings)


def import_coordconv_(
    model: nn.Module, example_inputs: Any = None, *, check: bool = True
) -> ImportReport:
    """Import the CoordConvs of a model in place; see :func:`import_coordconv`.

    An optimizer that was built before does not know the new parameters.

    Raises:
        PatchError: As :func:`import_coordconv`; the model is unchanged then.
    """
    with LOOK:
        return _import_(model, _findings(model, example_inputs, check))


@dataclass(frozen=True)
class _Findings:
    recognition: Recognition
    pairs: tuple[RunPair, ...]
    inputs: tuple[Any, ...]
    """On which outputs are to be compared."""


def _findings(model: nn.Module, example_inputs: Any, check: bool) -> _Findings:
    check_flag("check", check)
    check_is_module(model)
    check_has_values(model)
    check_example_inputs(example_inputs)
    check_not_wrapped(model)
    if example_inputs is None:
        findings = _Findings(recognise_alone(model), (), ())
    else:
        inputs = tuple(_sizes(model, example_inputs))
        pairs = tuple(_pair(model, each) for each in inputs)
        findings = _Findings(recognise(model, pairs), pairs, inputs if check else ())
    recognition = findings.recognition
    if not recognition.convolutions:
        raise PatchError(_nothing(recognition, example_inputs))
    return findings


def _nothing(recognition: Recognition, example_inputs: Any) -> str:
    if recognition.refused:
        reasons = "; ".join(f"{name}: {why}" for name, why in recognition.refused.items())
        return f"no convolution can be imported. {reasons}"
    if example_inputs is None:
        return (
            "no module of the model joins coordinates and a convolution; for coordinates that its "
            "other code concatenates, pass example_inputs"
        )
    return "no convolution of the model sees coordinate channels beside an image, on these inputs"


def _sizes(model: nn.Module, example_inputs: Any) -> Iterator[Any]:
    """Example inputs that the model takes: as given, and with larger images if it can."""
    yield example_inputs
    for growth in GROWTHS:
        larger = resized(example_inputs, growth)
        try:
            record(model, larger, lambda module: False)
        except PatchError:
            continue
        yield larger
        return


def _pair(model: nn.Module, inputs: Any) -> RunPair:
    first = record(model, inputs, may_be_rewritten)
    return first, record(model, other_images(inputs), may_be_rewritten)


def _import_(model: nn.Module, findings: _Findings) -> ImportReport:
    recognition = findings.recognition
    chosen = tuple(recognition.convolutions.values())
    before = OutputsBefore(model, findings.inputs)
    state = ModuleStates(model)
    names = rewrite_(model, chosen, joins_of(model, chosen, findings.pairs))
    try:
        difference = before.compare(model)
    except PatchError:
        state.restore()
        raise
    _warn(recognition)
    sites = tuple(_site(each, names[each.conv]) for each in chosen)
    return ImportReport(model, sites, recognition.refused, difference)


def _site(recognised: Recognised, name: str) -> ImportedSite:
    ndim = len(recognised.sizes[0])
    return ImportedSite(
        name,
        recognised.coords,
        recognised.coords.channel_names(ndim),
        _was(recognised),
        recognised.is_first,
        recognised.sizes,
        recognised.deviation,
    )


def _was(recognised: Recognised) -> str:
    place = recognised.places[0]
    joined = place.name or "the model"
    if recognised.still_joined:
        return f"{recognised.still_joined}, so they are joined still, and it reads the image alone"
    if place.kind == "layer":
        return f"{joined} joined and convolved them, and is the layer itself now"
    if place.kind == "module":
        return f"{joined} joined them, and passes its input on now"
    return f"the forward of {joined} joined them, and leaves them out now"


def _warn(recognition: Recognition) -> None:
    for name, reason in recognition.refused.items():
        warnings.warn(f"{name} sees coordinates and is left as it is: {reason}", stacklevel=4)
    for each in recognition.convolutions.values():
        lengths = zip(*each.sizes, strict=True)
        if all(len(set(along)) == 1 for along in lengths):
            warnings.warn(
                f"{each.conv} was seen at one size only, {each.sizes[0]}, where several "
                f"conventions may fit; taken was {each.coords}",
                stacklevel=4,
            )
