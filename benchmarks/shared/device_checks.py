"""What must hold on every device, as plain functions: they need no pytest.

Each takes a device and raises an ``AssertionError`` that says what does not hold. Values are
compared with :mod:`.ports`, which concatenates coordinates and knows nothing of the package; in
float64, as GPUs compute float32 convolutions in TF32, with 10 bits of mantissa.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.lowering.lower import lower_
from coordconv_patch.lowering.registry import LOWERINGS
from shared.models import Tiny, images
from shared.ports import BufferCoords, PortedConv2d, ported
from shared.variants import patched, seeded

__all__ = ["CHECKS"]

_SIZE = 32
_EXACT, _PORT, _SINGLE, _LOW_PRECISION = 1e-9, 1e-7, 5e-3, 3e-2
"""Allowed differences, relative to the largest value: in float64; to the port, whose coordinates
are float32; in float32, which may be TF32; in 16 bits (bfloat16 has 7 of mantissa).
"""


def _example() -> Tensor:
    return images(2, _SIZE)


def _with_coordinates(scale: float = 0.1) -> nn.Module:
    """The tiny network on the CPU with coordinate weights that matter."""
    model = patched(seeded(Tiny), "all", _example())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_(std=scale, generator=generator)
    return model


def _concatenating(model: nn.Module) -> nn.Module:
    """The same function as a patched model's, by concatenation; on the CPU, in float32."""
    layers = coord_layers(model)
    plain = ccp.unpatch(model, discard=True)
    port = ported(plain, list(layers), BufferCoords, _example())
    with torch.no_grad():
        for name, layer in layers.items():
            wide = port.get_submodule(name)
            _require(isinstance(wide, PortedConv2d), f"{name} was not ported")
            wide.conv.weight[:, -layer.coord_weight.shape[1] :] = layer.coord_weight
    return port


def check_zero_weights(device: torch.device) -> None:
    """At zero weights outputs and the plain weights' gradients are equal to the last bit."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        plain = seeded(Tiny).to(device, dtype)
        model = ccp.patch(plain, "all")
        x = _example().to(device, dtype)
        with torch.no_grad():
            _require_equal(model(x), plain(x), f"outputs in {dtype}")
        _require_equal(model(x), plain(x), f"outputs with gradients on, in {dtype}")
    plain, model = plain.float().train(), model.float().train()
    x = x.float()
    _require_equal(model(x), plain(x), "outputs in training mode")
    for each in (plain, model):
        each.eval()(x).square().sum().backward()
    for name, weight in plain.named_parameters():
        _require_close(model.get_parameter(name).grad, weight.grad, _SINGLE, f"gradient of {name}")


def check_concatenation(device: torch.device) -> None:
    """Outputs and gradients are those of the published layer, at non-zero weights."""
    model = _with_coordinates().to(device)
    port = _concatenating(_with_coordinates()).to(device)
    x = _example().to(device)
    _require_close(model(x), port(x), _SINGLE, "outputs in float32")
    model, port, x = model.double(), port.double(), x.double()
    for _ in range(2):  # the second call may find what the first one kept
        with torch.no_grad():
            _require_close(model(x), port(x), _PORT, "outputs in float64")
    for each in (model, port):
        each(x).square().sum().backward()
    for name, layer in coord_layers(model).items():
        wide = port.get_submodule(name).conv.weight.grad
        joined = torch.cat((layer.weight.grad, layer.coord_weight.grad), dim=1)
        _require_close(joined, wide, _PORT, f"gradient of {name}")


def check_autocast(device: torch.device) -> None:
    """Under autocast: equal at zero; close, and trained in float32, at non-zero weights."""
    x = _example().to(device)
    plain = seeded(Tiny).to(device)
    zero = ccp.patch(plain, "all")
    model = _with_coordinates().to(device)
    port = _concatenating(_with_coordinates()).to(device)
    dtypes = (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.bfloat16,)
    for dtype in dtypes:
        with torch.autocast(device.type, dtype):
            _require_equal(zero(x), plain(x), f"outputs under autocast to {dtype}")
            output = model(x)
            _require_close(output, port(x), _LOW_PRECISION, f"outputs under autocast to {dtype}")
        model.zero_grad()
        output.float().square().sum().backward()
        for weight in ccp.coord_parameters(model):
            _require(weight.grad is not None, "a coordinate weight has no gradient")
            _require(weight.grad.dtype is torch.float32, f"a gradient is {weight.grad.dtype}")
            _require(bool(weight.grad.isfinite().all()), "a gradient is not finite")


def check_channels_last(device: torch.device) -> None:
    """Channels-last models stay so, with the same outputs."""
    layout = torch.channels_last
    x = _example().to(device, memory_format=layout)
    plain = seeded(Tiny).to(device, memory_format=layout)
    zero = ccp.patch(plain, "all")
    model = _with_coordinates().to(device, memory_format=layout)
    with torch.no_grad():
        _require_equal(zero(x), plain(x), "outputs")
        before, after = plain.stem[0](x), model.stem[0](x)
        _require(before.stride() == after.stride(), f"strides {after.stride()}, not as the plain")
        usual = _with_coordinates().to(device, torch.float64)
        model, x = model.double(), x.double()
        _require_close(model(x), usual(x.contiguous()), _EXACT, "outputs at non-zero weights")


def check_places(device: torch.device) -> None:
    """A tile in its place gives what the whole picture gives there."""
    plain = nn.Conv2d(3, 8, 3).to(device, torch.float64)
    picture = images(2, 48).to(device, torch.float64)
    model = patched(plain.cpu(), "all", picture.cpu()).to(device)
    plain = plain.to(device)
    tile = picture[..., 8:32, 16:48]
    window = ccp.Window((8, 16), (24, 32), (48, 48))
    with torch.no_grad():
        whole = model(picture)[..., 8:30, 16:46]
        away = (model(tile) - whole).abs().max()
        with ccp.places(model, window):
            _require_close(model(tile), whole, _EXACT, "a tile in its window")
        theta = window.theta().to(device).expand(2, 2, 3)
        with ccp.places(model, theta):
            _require_close(model(tile), whole, 1e-6, "tiles with a place each")
        _require(bool(away > 1e-5), "without a place the tile should differ")
        zero = ccp.patch(plain, "all")
        with ccp.places(zero, theta):
            _require_equal(zero(tile), plain(tile), "a tile at zero weights")


def check_moves(device: torch.device) -> None:
    """What layers keep between calls goes with the model: device, dtype, values, copies."""
    cpu = torch.device("cpu")
    x = _example().double()
    for model in (_with_coordinates().double(), ccp.fold(_with_coordinates()).double()):
        with torch.no_grad():
            expected = model(x)
            for place in (device, cpu, device):
                for _ in range(2):
                    output = model.to(place)(x.to(place))
                    _require(output.device.type == place.type, f"the output is on {output.device}")
                    _require_close(output.cpu(), expected, _EXACT, f"outputs on {place}")
            other = copy.deepcopy(model).to(cpu)
            _require_close(other(x), expected, _EXACT, "outputs of a copy on the CPU")
            single = model.float()(x.float().to(device))
            _require(single.dtype is torch.float32, f"the output is {single.dtype}")
            _require_close(single.double().cpu(), expected, _SINGLE, "outputs in float32")
    model = _with_coordinates().to(device)
    port = _concatenating(_with_coordinates(scale=0.1)).to(device)
    x = _example().to(device)
    with torch.no_grad():
        model(x)
        for name, layer in coord_layers(model).items():
            layer.coord_weight.data.mul_(-2.0)
            port.get_submodule(name).conv.weight[:, -layer.coord_weight.shape[1] :].mul_(-2.0)
        _require_close(model(x), port(x), _SINGLE, "outputs after the weights changed")


def check_fold(device: torch.device) -> None:
    """A folded model gives the same, whether it was folded on this device or before."""
    model, x = _with_coordinates().double(), _example().double()
    with torch.no_grad():
        expected = model(x)
        for folded in (ccp.fold(copy.deepcopy(model).to(device)), ccp.fold(model).to(device)):
            for _ in range(2):
                _require_close(folded(x.to(device)).cpu(), expected, _EXACT, "outputs")
            _require(not any("norm" in type(m).__name__.lower() for m in folded.modules()), "norms")


def check_files(device: torch.device) -> None:
    """State dicts and coordinate files of one device load on another."""
    model, x = _with_coordinates().to(device), _example()
    plain = seeded(Tiny)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = ccp.save_coords(model, Path(folder) / "coords.safetensors")
        expected = _with_coordinates().double()(x.double())
        for place in (torch.device("cpu"), device):
            loaded = ccp.load_coords(copy.deepcopy(plain).to(place), path)
            _require_device(loaded, place)
            output = loaded.double()(x.to(place, torch.float64)).cpu()
            _require_close(output, expected, _EXACT, f"outputs of a file loaded on {place}")
            state = Path(folder) / "state.pt"
            torch.save(model.state_dict(), state)
            fresh = ccp.patch(plain, "all").to(place)
            fresh.load_state_dict(torch.load(state, map_location=place, weights_only=True))
            _require_device(fresh, place)
            output = fresh.double()(x.to(place, torch.float64)).cpu()
            _require_close(output, expected, _EXACT, f"outputs of a state dict loaded on {place}")


def check_compile(device: torch.device) -> None:
    """A compiled model gives what the eager one does, also after its weights changed."""
    model, x = _with_coordinates().to(device), _example().to(device)
    torch.compiler.reset()
    # Inductor takes a minute on a CPU, and writes the same code for all that is checked here.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        _require_close(compiled(x), model(x), _SINGLE, "outputs")
        first = next(iter(ccp.coord_parameters(model)))
        before = compiled(x).clone()
        first.mul_(-2.0)
        _require_close(compiled(x), model(x), _SINGLE, "outputs after the weights changed")
        _require(not torch.equal(compiled(x), before), "the new weights should show")


def check_lowerings(device: torch.device) -> None:
    """Each form that a graph can have, lowered on this device, is the published function."""
    x = _example().to(device, torch.float64)
    expected = _concatenating(_with_coordinates()).to(device, torch.float64)(x)
    for name in LOWERINGS:
        model = _with_coordinates().to(device, torch.float64)
        with torch.no_grad():
            chosen = lower_(model, x, lambda _, name=name: name).lowerings
            _require(set(chosen.values()) == {name}, f"{name}: the sites got {chosen}")
            _require_close(model(x), expected, _PORT, f"outputs lowered to {name}")


CHECKS: dict[str, Callable[[torch.device], None]] = {
    "zero weights": check_zero_weights,
    "concatenation": check_concatenation,
    "autocast": check_autocast,
    "channels last": check_channels_last,
    "places": check_places,
    "moves": check_moves,
    "fold": check_fold,
    "files": check_files,
    "lowerings": check_lowerings,
    "compile": check_compile,
}
"""By name. Each takes the device."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _require_equal(output: Tensor, expected: Tensor, what: str) -> None:
    _require(output.device == expected.device, f"{what}: on {output.device}")
    _require(output.dtype is expected.dtype, f"{what}: {output.dtype}, not {expected.dtype}")
    if not torch.equal(output, expected):
        largest = (output - expected).abs().max().item()
        raise AssertionError(f"{what}: not equal, up to {largest:.3g} apart")


def _require_close(output: Tensor | None, expected: Tensor | None, most: float, what: str) -> None:
    """Within ``most`` of the largest expected value; a NaN is not."""
    _require(output is not None and expected is not None, f"{what}: missing")
    assert output is not None
    assert expected is not None
    _require(output.shape == expected.shape, f"{what}: {output.shape}, not {expected.shape}")
    scale = expected.detach().double().abs().max()
    difference = (output.detach().double() - expected.detach().double()).abs().max() / scale
    _require(bool(difference <= most), f"{what}: {difference.item():.3g} apart, {most:.3g} allowed")


def _require_device(model: nn.Module, device: torch.device) -> None:
    elsewhere = [n for n, p in model.named_parameters() if p.device.type != device.type]
    _require(not elsewhere, f"not on {device}: {elsewhere}")
