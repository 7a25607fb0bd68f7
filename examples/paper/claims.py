"""The paper's claims, where their figures lie in the records, and what we make of them.

"The paper" is Liu et al. 2018 with the authors' blog post and released code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        label: What the page calls it.
        setting: Of the runs in the record.
        variant: Likewise; with a star at the end, the best of those that begin so.
        metric: Name of the metric.
        form: Format of the number.
        by_seed: Whether every seed's figure is shown instead of their mean.
    """

    label: str
    setting: str
    variant: str
    metric: str
    form: str = ".3f"
    by_seed: bool = False


@dataclass(frozen=True)
class Claim:
    """A row of the page.

    Attributes:
        claim: What is claimed.
        paper: What the paper measured.
        experiment: The record, and the script that makes it.
        figures: What was measured here.
        verdict: Whether that reproduces it, in a few words.
    """

    claim: str
    paper: str
    experiment: str
    figures: tuple[Figure, ...]
    verdict: str


def _classification(split: str, plain: tuple[Figure, ...], verdict: str) -> Claim:
    return Claim(
        f"Coordinates to one-hot pixel, {split} split: test accuracy",
        "CoordConv perfect on train and test in seconds; convolution never above 86 %",
        "classification",
        (Figure("patched", split, "patched", "test accuracy"), *plain),
        verdict,
    )


def _rendering(split: str, paper: str, figures: tuple[Figure, ...], verdict: str) -> Claim:
    claim = f"Coordinates to a 9x9 square, {split} split: test IOU"
    patched = Figure("patched", split, "patched", "test IOU")
    return Claim(claim, paper, "rendering", (patched, *figures), verdict)


def _regression(split: str, verdict: str) -> Claim:
    return Claim(
        f"One-hot pixel to coordinates, {split} split: test error in pixels",
        "CoordConv models it well; convolution is poor on test",
        "regression",
        (
            Figure("patched, by seed", split, "patched", "test error, px", ".1g", by_seed=True),
            Figure("convolutions and max-pools", split, "pooling", "test error, px", ".2g"),
            Figure("strided convolutions", split, "strided", "test error, px", ".2g"),
        ),
        verdict,
    )


def _detection(setting: str, claim: str, paper: str, verdict: str, *variants: str) -> Claim:
    return Claim(
        claim,
        paper,
        "detection",
        tuple(Figure(variant, setting, variant, "IOU of best boxes") for variant in variants),
        verdict,
    )


def _finetuning(setting: str, claim: str, metric: str, form: str, verdict: str) -> Claim:
    return Claim(
        claim,
        "not in the paper",
        "finetune",
        tuple(
            Figure(label, setting, variant, metric, form)
            for label, variant in (
                ("plain, trained on", "plain, kept on"),
                ("first patched", "patched: first"),
                ("all patched", "patched: all"),
                ("first patched, coordinates scrambled", "patched: first, scrambled"),
            )
        ),
        verdict,
    )


def _films(experiment: str, setting: str, claim: str, verdict: str, *variants: str) -> Claim:
    return Claim(
        claim,
        "objects move smoothly along interpolations instead of fading in and out",
        experiment,
        tuple(Figure(variant, setting, variant, "sliding_films", ".2f") for variant in variants),
        verdict,
    )


def _grid(setting: str, claim: str, verdict: str, *variants: str) -> Claim:
    return Claim(
        f"Going to a target on a grid, {claim}: success rate",
        "not in the paper",
        "reinforcement_learning",
        tuple(Figure(variant, setting, variant, "success", ".2f") for variant in variants),
        verdict,
    )


_DECONV = "transposed convolutions, the best of a small sweep"

CLAIMS = (
    _classification(
        "uniform",
        (
            Figure(_DECONV, "uniform", "deconv*", "test accuracy"),
            Figure("the same 1x1 net, plain", "uniform", "plain", "test accuracy", ".4f"),
            Figure("patched, coordinates scrambled", "uniform", "scrambled", "test accuracy"),
        ),
        "yes for CoordConv. The plain net had 30 epochs, not 1,000: its figure is no limit",
    ),
    _classification(
        "quadrant",
        (Figure(_DECONV, "quadrant", "deconv*", "test accuracy"),),
        "yes, in two of three seeds to the last pixel",
    ),
    _rendering(
        "uniform",
        "CoordConv perfect; convolution at most .83",
        (Figure(_DECONV, "uniform", "deconv*", "test IOU"),),
        "yes, with 9 times fewer parameters (not 10 to 100 times)",
    ),
    _rendering(
        "quadrant",
        "CoordConv perfect; convolution at most .36",
        (Figure(_DECONV, "quadrant", "deconv*", "test IOU"),),
        "yes",
    ),
    _regression(
        "uniform",
        "CoordConv in two of three seeds, the third did not learn; max-pools are not poor here",
    ),
    _regression("quadrant", "in two of three seeds; the third did not learn"),
    _detection(
        "as released",
        "Detection of scattered digits, as in the released code: IOU of the best boxes",
        "IOU about 24 % better",
        "no: the gain is within the spread of the seeds",
        *("plain", "patched", "scrambled"),
        *("patched: input only", "patched: RPN only", "patched: box regression only"),
    ),
    *(
        _detection(setting, f"The same, {words}", "", "no gain", "plain", "patched")
        for setting, words in (
            ("whole digits", "digits that no edge cuts off"),
            ("zero padding everywhere", "zero padding everywhere"),
            ("no padding at all", "no padding at all"),
            ("sampled by anchors", "training boxes sampled by anchors"),
            ("trained 3 times as long", "trained three times as long"),
            ("Faster R-CNN", "torchvision's Faster R-CNN"),
            (
                "Faster R-CNN, whole digits",
                "torchvision's Faster R-CNN, digits that no edge cuts off",
            ),
        )
    ),
    Claim(
        "Image classification, ResNet-18 on digits: test accuracy",
        "+0.04 % top-5, not significant",
        "image_classification",
        tuple(
            Figure(variant, "resnet18, digits", variant, "accuracy", ".4f")
            for variant in ("plain", "patched", "scrambled")
        ),
        "yes: no harm, and no gain beyond the spread",
    ),
    _films(
        "vae",
        "deconv",
        "VAE: films in which the square slides, decoder of transposed convolutions",
        "no: the patched one slides no more often",
        *("plain", "patched"),
    ),
    _films(
        "vae",
        "tiled",
        "The same, with the latent tiled over the map",
        "yes, with every seed: only coordinates place the square there, and then it slides; "
        "scrambled ones paint a blur in its place, slowly",
        *("plain", "patched", "scrambled"),
    ),
    _films(
        "gan",
        "deconv",
        "GAN: films in which the square slides, generator of transposed convolutions",
        "hardly: the gain is little larger than the spread of the seeds",
        *("plain", "patched"),
    ),
    Claim(
        "The same: part of all positions painted, and of pictures of one whole square",
        "not in the paper",
        "gan",
        tuple(
            Figure(f"{variant}, {name}", "deconv", variant, metric, ".2f")
            for metric, name in (("coverage", "positions"), ("intact", "whole squares"))
            for variant in ("plain", "patched")
        ),
        "alike: neither has collapsed; squares are not yet whole, so longer training may tell more",
    ),
    _films(
        "gan",
        "tiled",
        "The same, with the latent tiled over the map",
        "yes, with every seed; scrambled coordinates paint several torn squares at once",
        *("plain", "patched", "scrambled"),
    ),
    *(
        _grid(
            f"{algorithm}, NatureCNN",
            f"{algorithm} with NatureCNN",
            "no difference: its flattened features know places already",
            *("plain", "patched"),
        )
        for algorithm in ("A2C", "PPO")
    ),
    *(
        _grid(
            f"{algorithm}, pooled",
            f"{algorithm} with a net that sees each cell alone and pools",
            "helps: the plain one cannot learn it; scrambled coordinates end alike, but later",
            *("plain", "patched", "scrambled"),
        )
        for algorithm in ("A2C", "PPO")
    ),
    Claim(
        "A2C on Ms. Pac-Man: points an episode at the end of a short run, and speed",
        "CoordConv better",
        "reinforcement_learning",
        tuple(
            Figure(f"{variant}, {unit}", "A2C, Ms. Pac-Man", variant, metric, ".0f")
            for metric, unit in (("return", "points"), ("frames_per_second", "frames a second"))
            for variant in ("plain", "patched")
        ),
        "not to be told: one seed, and far too few frames",
    ),
    _finetuning(
        "narrow view, unpadded",
        "Patched after training: a localiser that sees 15 x 15 pixels, IOU",
        "IOU",
        ".3f",
        "helps; scrambled coordinates help as much, so what it lacked were places, not their order",
    ),
    _finetuning(
        "narrow view, zero-padded", "The same, zero-padded", "IOU", ".3f", "helps; scrambled alike"
    ),
    _finetuning(
        "wide view, unpadded",
        "One that sees 31 x 31 pixels, unpadded",
        "IOU",
        ".3f",
        "helps less; scrambled alike",
    ),
    _finetuning(
        "wide view, zero-padded",
        "The same, zero-padded",
        "IOU",
        ".3f",
        "helps less; scrambled alike",
    ),
    _finetuning(
        "EfficientNet-Lite0",
        "ImageNet EfficientNet-Lite0, a cup at 64 pixels: median error in pixels",
        "median error, px",
        ".1f",
        "all patched: yes; the first alone: no. (No scrambled control of all.)",
    ),
)
