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
class Comparison:
    """The cost of the patched net against a plain net's, seed by seed.

    Attributes:
        label: What the page calls the plain net.
        setting: Of the runs in the record.
        variant: The plain net's; with a star at the end, the best of those that begin so.
        metric: What the best of those is chosen by, and what the curves show.
        higher_is_better: Whether a high score is a good one.
        patched: The patched net's variant.
    """

    label: str
    setting: str
    variant: str
    metric: str
    higher_is_better: bool = True
    patched: str = "patched"


@dataclass(frozen=True)
class Gain:
    """How much higher one variant scores than another, seed by seed.

    Attributes:
        label: What the page calls it.
        setting: Of the runs in the record.
        variant: The one, of the same setting.
        control: The other.
        metric: Name of the metric.
        form: Format of the numbers.
    """

    label: str
    setting: str
    variant: str
    control: str
    metric: str
    form: str = "+.3f"


@dataclass(frozen=True)
class Claim:
    """A row of the page.

    Attributes:
        claim: What is claimed.
        paper: What the paper measured.
        experiment: The record, and the script that makes it.
        figures: What was measured here, and at what cost.
        verdict: Whether that reproduces it, in a few words.
    """

    claim: str
    paper: str
    experiment: str
    figures: tuple[Figure | Comparison | Gain, ...]
    verdict: str


def _controls(split: str, metric: str, form: str) -> tuple[Figure, ...]:
    """What should learn nothing."""
    return (
        Figure("the patched net, plain", split, "plain", metric, form),
        Figure("patched, coordinates scrambled", split, "scrambled", metric, form),
    )


def _supervised(
    experiment: str,
    claim: str,
    paper: str,
    split: str,
    metric: str,
    verdict: str,
    *more: Figure | Comparison,
    sweep: str = "a sweep",
) -> Claim:
    """A row whose plain net is a stack of transposed convolutions."""
    return Claim(
        f"{claim}, {split} split: {metric}",
        paper,
        experiment,
        (
            Figure("patched", split, "patched", metric),
            Figure(f"transposed convolutions, the best of {sweep}", split, "deconv*", metric),
            *(_controls(split, metric, ".4f") if split == "uniform" else ()),
            Comparison("the transposed convolutions", split, "deconv*", metric),
            *more,
        ),
        verdict,
    )


def _classification(split: str, verdict: str, *more: Figure | Comparison) -> Claim:
    return _supervised(
        "classification",
        "Coordinates to one-hot pixel",
        "CoordConv perfect on train and test in seconds, 150 times faster; convolution never above "
        "86 %",
        split,
        "test accuracy",
        verdict,
        *more,
        sweep="a sweep on the uniform split",
    )


def _rendering(split: str, paper: str, verdict: str) -> Claim:
    narrower, metric = "patched, narrower", "test IOU"
    label = "the transposed convolutions, by the narrower one"
    stack = Comparison(label, split, "deconv*", metric, patched=narrower)
    return _supervised(
        *("rendering", "Coordinates to a 9x9 square", paper, split, metric, verdict),
        *(Figure(narrower, split, narrower, metric), stack),
    )


def _regression(split: str, verdict: str) -> Claim:
    metric = "test error, px"
    plain_nets = {"pooling": "convolutions and max-pools", "strided": "strided convolutions"}
    return Claim(
        f"One-hot pixel to coordinates, {split} split: test error in pixels",
        "CoordConv models it well; convolution is poor on test",
        "regression",
        (
            Figure("patched, by seed", split, "patched", metric, ".1g", by_seed=True),
            *(Figure(label, split, net, metric, ".2g") for net, label in plain_nets.items()),
            *_controls(split, metric, ".2g"),
            *(
                Comparison(f"the {label}", split, net, metric, higher_is_better=False)
                for net, label in plain_nets.items()
            ),
        ),
        verdict,
    )


_ONE_SITE = ("patched: input only", "patched: RPN only", "patched: box regression only")


def _detection(
    setting: str,
    claim: str,
    paper: str,
    verdict: str,
    *variants: str,
    metric: str = "IOU of best boxes",
) -> Claim:
    return Claim(
        claim,
        paper,
        "detection",
        (
            *(Figure(variant, setting, variant, metric) for variant in variants),
            Gain("patched against plain, by seed", setting, "patched", "plain", metric),
        ),
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
                ("all patched, coordinates scrambled", "patched: all, scrambled"),
                ("first patched, from scratch", "patched: first, from scratch"),
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
        f"Going to a target on a grid, {claim}: success rate from every start",
        "not in the paper",
        "reinforcement_learning",
        tuple(Figure(variant, setting, variant, "success", ".2f") for variant in variants),
        verdict,
    )


_LONG_DECONV = "the same transposed convs, 10 times longer"

CLAIMS = (
    _classification(
        "uniform",
        "yes for the accuracy, in tens of seconds of one CPU core. The plain net had 30 epochs, "
        "not 1,000: its figure is no limit; ten times as many brought more training accuracy "
        "(.88), and not more on test",
        Figure(_LONG_DECONV, "uniform", _LONG_DECONV, "test accuracy"),
        Comparison(_LONG_DECONV, "uniform", _LONG_DECONV, "test accuracy"),
    ),
    _classification(
        "quadrant",
        "yes, with every seed to the last pixel; the patched net's recipe was chosen with one of "
        "these seeds",
    ),
    _rendering(
        "uniform",
        "CoordConv perfect; convolution at most .83",
        "yes, and the stack is no better than the authors' either, though with 14 epochs, not "
        "1,000",
    ),
    _rendering(
        "quadrant",
        "CoordConv perfect; convolution at most .36",
        "yes; both nets were chosen by their scores on this split",
    ),
    _regression(
        "uniform",
        "yes for CoordConv; convolutions come to half a pixel, which is not poor",
    ),
    _regression("quadrant", "yes"),
    _detection(
        "all digits, as released",
        "Detection of scattered digits, as in the released code, 300 steps: IOU of the best boxes",
        "IOU about 24 % better",
        "no gain: a move says where a box is from its anchor, which is alike at every place "
        "(where it must say more, see below, there is one)",
        *("plain", "patched", "scrambled"),
    ),
    _detection(
        "as released, full widths, batch of 1",
        "The same with all of the released channels, a batch of 1, 3,000 steps",
        "",
        "no gain: worse in every seed",
        *("plain", "patched"),
    ),
    _detection(
        "seen digits, boxes not cut off",
        "Only digits that can be seen, with their whole boxes: IOU of those that an edge cuts off",
        "",
        "a gain in every seed after 300 steps, not with scrambled coordinates",
        *("plain", "patched", "scrambled"),
        metric="IOU of cut-off digits",
    ),
    _detection(
        "seen digits, boxes not cut off, 3 times as long",
        "The same after 900 steps",
        "",
        "no gain: the plain net has caught up",
        *("plain", "patched"),
        metric="IOU of cut-off digits",
    ),
    _detection(
        "seen digits, boxes not cut off",
        "The same after 300 steps: IOU of the best boxes",
        "",
        "a gain in every seed, in two of them hardly; not with scrambled coordinates",
        *("plain", "patched", "scrambled"),
    ),
    _detection(
        "seen digits, boxes not cut off, 3 times as long",
        "The same after 900 steps: IOU of the best boxes",
        "",
        "no gain: worse in every seed",
        *("plain", "patched"),
    ),
    _detection(
        "seen digits, cut off",
        "Only digits that can be seen, boxes cut off at the edge: IOU of the best boxes",
        "",
        "no: the gain is within the spread of the seeds",
        *("plain", "patched", "scrambled", *_ONE_SITE),
    ),
    *(
        _detection(setting, f"The same, {words}", "", verdict, "plain", "patched")
        for setting, words, verdict in (
            ("whole digits", "digits that no edge cuts off", "no gain"),
            ("zero padding everywhere", "zero padding everywhere", "no gain"),
            ("no padding at all", "no padding at all", "no gain"),
            ("sampled by anchors", "training boxes sampled by anchors", "no gain"),
            (
                "trained 3 times as long",
                "trained three times as long",
                "no gain: worse in every seed, in one of them hardly",
            ),
            (
                "Faster R-CNN",
                "torchvision's Faster R-CNN, 225 steps",
                "no gain: worse in every seed",
            ),
            (
                "Faster R-CNN, whole digits",
                "torchvision's Faster R-CNN, 225 steps, digits that no edge cuts off",
                "no gain",
            ),
        )
    ),
    _detection(
        "absolute boxes",
        "Sampled by anchors, but with moves that say where on the canvas a box is",
        "not in the paper",
        "a gain in every seed: coordinates double the IOU, and scrambled ones do not, so here "
        "their order matters; but boxes that move from anchors do better without any (see above)",
        *("plain", "patched", "scrambled", *_ONE_SITE),
    ),
    *(
        Claim(
            f"Image classification, ResNet-{depth} on digits: test accuracy",
            paper,
            "image_classification",
            tuple(
                Figure(variant, f"resnet{depth}, digits", variant, "accuracy", ".4f")
                for variant in ("plain", "patched", "scrambled")
            ),
            "no harm, and no gain that 450 test digits and three seeds could show",
        )
        for depth, paper in (
            (18, "not in the paper"),
            (50, "+0.04 % top-5 on ImageNet, not significant"),
        )
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
        "VAE: the same, with the latent tiled over the map",
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
    _films(
        "gan",
        "deconv, longer",
        "The same, ten times longer",
        "hardly: a little more often with two seeds of three, less with one",
        *("plain", "patched"),
    ),
    Claim(
        "The same: part of all positions painted, and of pictures of one whole square",
        "not in the paper",
        "gan",
        tuple(
            Figure(f"{variant}, {name}", "deconv, longer", variant, metric, ".2f")
            for metric, name in (("coverage", "positions"), ("intact", "whole squares"))
            for variant in ("plain", "patched")
        ),
        "alike: neither has collapsed; a third of the squares are still not whole",
    ),
    _films(
        "gan",
        "tiled",
        "GAN: films in which the square slides, with the latent tiled over the map",
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
        "A2C on Ms. Pac-Man: points an episode after 240,000 steps, 960,000 frames",
        "CoordConv better",
        "ms_pacman",
        tuple(
            Figure(variant, setting, variant, "return after 240,000 steps", ".0f")
            for setting, variant in (
                ("1.2 million steps", "plain"),
                ("240,000 steps", "patched"),
                ("240,000 steps", "patched: first"),
                ("240,000 steps", "plain, hidden layers"),
                ("1.2 million steps", "patched, hidden layers"),
            )
        ),
        "not shown: nets that differ by coordinates alone are alike, better with one seed and "
        "worse with the other (the first convolution alone: one seed). Worse are those with two "
        "hidden layers of 64 units for policy and value each, plain or patched, with both seeds: "
        "the cause of what the next row shows",
    ),
    Claim(
        "The same after 4.8 million frames, and speed; the patched net has hidden layers, the "
        "plain one has none",
        "",
        "ms_pacman",
        tuple(
            Figure(f"{variant}, {unit}", "1.2 million steps", variant, metric, ".0f")
            for metric, unit in (("return", "points"), ("frames_per_second", "frames a second"))
            for variant in ("plain", "patched, hidden layers")
        ),
        "says nothing of coordinates: stable-baselines3 adds the hidden layers where the class of "
        "the features extractor is not NatureCNN itself",
    ),
    _finetuning(
        "narrow view, unpadded",
        "Patched after training: a localiser that sees 15 x 15 pixels, IOU",
        "IOU",
        ".3f",
        "helps; scrambled coordinates help as much and a little more, so what it lacked were "
        "places, not their order",
    ),
    _finetuning(
        "narrow view, unpadded, new places",
        "The same, tested in a quadrant where training shows no digit",
        "IOU",
        ".3f",
        "helps; scrambled coordinates much less: order is what carries over to new places. From "
        "scratch with coordinates it does better still, with a third of the steps",
    ),
    _finetuning(
        "narrow view, zero-padded",
        "A zero-padded one that sees 15 x 15",
        "IOU",
        ".3f",
        "helps; scrambled coordinates a little more",
    ),
    _finetuning(
        "wide view, unpadded",
        "One that sees 31 x 31 pixels, unpadded",
        "IOU",
        ".3f",
        "helps less; scrambled coordinates more, with every seed",
    ),
    _finetuning(
        "wide view, zero-padded",
        "The same, zero-padded",
        "IOU",
        ".3f",
        "helps less; scrambled coordinates more, with every seed",
    ),
    _finetuning(
        "EfficientNet-Lite0",
        "ImageNet EfficientNet-Lite0, a cup at 64 pixels: median error in pixels",
        "median error, px",
        ".1f",
        "yes where all are patched, most of it with scrambled coordinates too; the first alone: no",
    ),
)
