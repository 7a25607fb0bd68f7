"""A model card: what coordinate weights are, which model they belong to, and how to load them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from coordconv_patch.display.shown import Shown
from coordconv_patch.errors import listing
from coordconv_patch.status import LayerStatus

__all__ = ["model_card"]

_TAGS = ("coordconv", "coordconv-patch")

_TEXT = """\
# Coordinate weights for {title}

{count} convolution{s} of {title} also see{verb} coordinates ({channels}): {numbers:,} weights that
[coordconv-patch](https://pypi.org/project/coordconv-patch/) adds to the model's own, which are
not in this repository.

```python
import coordconv_patch as ccp

model = ...  # {title}, with the weights that these were trained with
model = ccp.from_pretrained(model, "{repository}")
```

| convolution | channels | shape | norm |
|:--|:--|:--|--:|
{rows}

They fit a model whose own weights have the fingerprint `{fingerprint}`; any other is refused.
"""

_MOST_ROWS = 100


def model_card(
    layers: Sequence[LayerStatus],
    fingerprint: str,
    *,
    base_model: str = "",
    repository: str = "OWNER/NAME",
    report: Shown | None = None,
) -> str:
    """The text of a README.md, with the fields that the Hugging Face Hub reads at its top.

    Args:
        layers: The coordinate layers of the patched model, at least one.
        fingerprint: That of the model's own weights.
        base_model: The repository of the model that was patched; may be empty.
        repository: Where the weights are to be loaded from.
        report: What else to show, such as an :class:`ExportReport`.
    """
    numbers = sum(_numbers(layer) for layer in layers)
    shown = [_row(layer) for layer in layers[:_MOST_ROWS]]
    if len(layers) > _MOST_ROWS:
        shown.append(f"| ... ({len(layers)} in all) | | | |")
    text = _TEXT.format(
        title=base_model or "a model",
        count=len(layers),
        s="" if len(layers) == 1 else "s",
        verb="s" if len(layers) == 1 else "",
        channels=listing(dict.fromkeys(str(layer.coords) for layer in layers)).strip("()"),
        numbers=numbers,
        repository=repository,
        rows="\n".join(shown),
        fingerprint=fingerprint[:12],
    )
    if report is not None:
        text += f"\n## {type(report).__name__}\n\n```\n{report}\n```\n"
    return f"{_fields(base_model)}\n{text}"


def _fields(base_model: str) -> str:
    """The card's metadata; what JSON is, YAML is too."""
    fields = [f"library_name: {json.dumps('coordconv-patch')}", f"tags: {json.dumps(_TAGS)}"]
    if base_model:
        fields.append(f"base_model: {json.dumps(base_model)}")
        fields.append('base_model_relation: "adapter"')
    return "\n".join(("---", *fields, "---"))


def _numbers(layer: LayerStatus) -> int:
    count = 1
    for size in layer.shape:
        count *= size
    return count


def _row(layer: LayerStatus) -> str:
    shape = "\u00d7".join(map(str, layer.shape))
    return f"| `{layer.name}` | {', '.join(layer.channels)} | {shape} | {layer.norm:.3g} |"
