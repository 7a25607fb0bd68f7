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
        variant: Likewise.
        metric: Name of the metric.
        form: Format of the number.
    """

    label: str
    setting: str
    variant: str
    metric: str
    form: str = ".3f"


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
            Figure("patched", split, "patched", "test error, px", ".2g"),
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


def _grid(setting: str, verdict: str) -> Claim:
    return Claim(
        f"{setting}, going to a target on a grid: success rate",
        "not in the paper",
        "reinforcement_learning",
        tuple(Figure(v, setting, v, "success", ".2f") for v in ("patched", "plain")),
        verdict,
    )
