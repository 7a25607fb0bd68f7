"""What is said of coordinates that were left behind: what happened, where, and what to write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from coordconv_patch.errors import listing

__all__ = [
    "on_doubles",
    "on_heirs",
    "on_lost_hooks",
    "on_merges",
    "on_parts",
    "on_scales",
    "on_silent_scales",
    "on_unknown_changes",
    "on_unknown_scales",
]


_ACCEPT = "If they are meant to go: coordconv_patch.forget_left_behind_(model)"
_REPEAT = "let coordconv_patch.fold_with(model, function) call the code that did this"


def on_heirs(heirs: Mapping[str, str]) -> str:
    """Of layers that are gone or do not run, by site; with what has their weight."""
    return (
        f"trained coordinates were left behind at {_places(heirs, 'now in')}: the coordinate "
        "convolution is gone, or does not run any more, and its weight lives on without its "
        "coordinate weight. Begin with the model as it was. A function that folds batch norms or "
        "sums branches: coordconv_patch.fold_with(model, function). A library that puts "
        "convolutions of its own in place (quantization, say): exclude these, or use it on what "
        f"export_onnx or torch.export makes of the model. {_ACCEPT}"
    )


def on_doubles(heirs: Mapping[str, str]) -> str:
    """Of layers that are there, by site; with what has their weight too."""
    return (
        "the weight of a coordinate convolution is in a new module too at "
        f"{_places(heirs, 'also in')}, without its trained coordinates. If that one runs in its "
        f"stead, the coordinates are lost: begin with the model as it was, and {_REPEAT}"
    )


def on_parts(heirs: Mapping[str, str]) -> str:
    """Of layers that are gone, by site; with what has channels of their weight."""
    return (
        f"a coordinate convolution is gone at {_places(heirs, 'now in')}, and channels of its "
        "weight are in a convolution with other channels, or in another order, without its "
        "trained coordinates. If that is meant, nothing is wrong; else patch the new convolution "
        "and copy the rows of coord_weight over"
    )


def on_scales(factors: Mapping[str, str]) -> str:
    """Of weights into which a batch norm was folded, by site; with the factors."""
    return (
        f"trained coordinates were left behind at {_places(factors, 'by')}: the output channels "
        "of the weight were scaled, as by a batch norm that is folded in, and the coordinate "
        f"weight was not. Begin with the model as it was, and {_REPEAT}. {_ACCEPT}"
    )


def on_lost_hooks(sites: Iterable[str]) -> str:
    """Of branches of chosen calls that nothing adds to them any more, by site."""
    return (
        f"trained coordinates do not run any more at {listing(sites)}: the forward hook that adds "
        "them to the chosen calls was taken away, as by module._forward_hooks.clear(). Begin with "
        f"the model as it was, and remove hooks by their own handles. {_ACCEPT}"
    )


def on_merges(sites: Mapping[str, str]) -> str:
    """Of weights that have changed while a norm went and a bias came, by site."""
    return (
        f"trained coordinates were left behind at {listing(sites)}: a batch norm is gone, a bias "
        "is new, and the weight has changed, as where branches are merged into one convolution, "
        f"and the coordinate weight has not. Begin with the model as it was, and {_REPEAT}. "
        f"{_ACCEPT}"
    )


def on_unknown_changes(sites: Mapping[str, str]) -> str:
    """Of the same where it cannot be told whether the coordinate weight was changed alike."""
    return (
        f"the weight has changed at {listing(sites)}, and a batch norm is gone or a bias is new, "
        "as where a batch norm is folded in or branches are merged. Whether the trained coordinate "
        "weight was changed alike cannot be told. If it was, nothing is wrong; if not, begin with "
        f"the model as it was, and {_REPEAT}"
    )


def on_silent_scales(factors: Mapping[str, str]) -> str:
    """Of weights that were scaled through ``.data``, by site; with the factors."""
    return (
        "the output channels of a weight were scaled through .data at "
        f"{_places(factors, 'by')}, and the trained coordinate weight was not. If that is the "
        "scale of the input, nothing is wrong; if something that comes after the convolution was "
        f"folded in, begin with the model as it was, and {_REPEAT}"
    )


def on_unknown_scales(factors: Mapping[str, str]) -> str:
    """Of the same where it cannot be told whether the coordinate weight was scaled alike."""
    return (
        "the output channels of a weight were scaled through .data at "
        f"{_places(factors, 'by')}. Whether the trained coordinate weight was scaled alike cannot "
        "be told. If it was, or if that is the scale of the input, nothing is wrong; if something "
        "that comes after the convolution was folded in, begin with the model as it was, and "
        f"{_REPEAT}"
    )


def _places(sites: Mapping[str, str], preposition: str) -> str:
    return listing(f"{site} ({preposition} {what})" for site, what in sites.items())
