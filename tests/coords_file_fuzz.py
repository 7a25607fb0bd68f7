"""Mutated coordinate files, and what load_coords_ makes of each of them.

    python tests/coords_file_fuzz.py --cases 12000      # prints its record as a table

A case takes a file that save_coords wrote, changes something in it, and loads it onto a model. Some
mutations keep the stored checksum, as damage does; others make it anew, as a foreign writer would.
Damage must never be taken for what was saved. What a foreign writer made may be another file,
but its types must be right and its values those of the model afterwards. In no case may another
exception than the package's come out, a message be long, a load take more than two seconds, or a
refused file leave anything of the model changed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import random
import signal
import struct
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import coordconv_patch as ccp
from coordconv_patch.errors import CoordConvPatchError
from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.owners.call_owners import owned_calls

KEY, CHECKSUM = "coordconv_patch", "coordconv_patch.checksum"
MOST_SECONDS = 2.0
LONGEST_MESSAGE = 1000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


# --- what is mutated ----------------------------------------------------------------------------


class Net(nn.Module):
    """Two convolutions around a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.stem(x))))


class Shared(nn.Module):
    """One convolution called three times, and one called once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.tail = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.conv(self.conv(self.conv(x))))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(2, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(self.conv(x)), self.kernel)


def two_conventions(model: nn.Module) -> nn.Module:
    window = ccp.Window((0, 2), (8, 8), (16, 12))
    coords = ccp.Coordinates(
        radius=True, radius_center=0.25, fourier=1, window=window, value_range=(0.0, 2.0)
    )
    return ccp.patch(ccp.patch(model, "stem", coords=coords), "head", coords="mkocabas")


def chosen_calls_patched(model: nn.Module) -> nn.Module:
    return ccp.patch(model, ["conv@0,2", "tail"], example_inputs=torch.zeros(1, 3, 8, 8))


class Scaled(Functional):
    """Calls functions by a weight that it stores, and by one that it computes."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(F.pad(self.conv(x), (1, 0, 1, 1), mode="reflect"), self.kernel)
        return F.conv2d(x, self.kernel[:, :2] * 2, dilation=2)


def functions_patched(model: nn.Module) -> nn.Module:
    radius = ccp.Radius(center=(0.0, 0.5), axes="yx", normalized=True)
    blocks = (ccp.Axes("y", (2.0, 0.0), "edges"), radius, ccp.Fourier("x", octaves=2, period=1.5))
    coords = ccp.Coordinates(channels=blocks)
    return ccp.patch(model, "all", coords=coords, example_inputs=torch.zeros(1, 3, 9, 9))


def odd_layers() -> nn.Module:
    first = nn.ConvTranspose1d(2, 4, 3, stride=2, output_padding=1, groups=2)
    second = nn.Conv1d(4, 4, 3, padding="same", padding_mode="circular")
    return nn.Sequential(first, second).bfloat16()


@dataclass
class Subject:
    """A kind of model, and a file of its coordinate weights."""

    name: str
    build: Callable[[], nn.Module]
    patch: Callable[[nn.Module], nn.Module]
    raw: bytes = b""

    def fresh(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def patched(self) -> nn.Module:
        return self.patch(self.fresh())


def subjects(folder: Path) -> list[Subject]:
    """The subjects, each with its file."""
    made = [
        Subject("two layers", Net, lambda model: ccp.patch(model, "all")),
        Subject("two conventions, norms", Net, two_conventions),
        Subject("chosen calls", Shared, chosen_calls_patched),
        Subject("odd layers", odd_layers, lambda model: ccp.patch(model, "all")),
        Subject("graph", lambda: fx.symbolic_trace(Functional()), lambda m: ccp.patch(m, "all")),
        Subject("functions", Scaled, functions_patched),
    ]
    for subject in made:
        model = subject.patched()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in ccp.coord_parameters(model):
                weight.normal_(generator=generator)
        path = ccp.save_coords(
            model, folder / "saved.safetensors", include_batch_norm="norms" in subject.name
        )
        subject.raw = path.read_bytes()
    return made


# --- a file taken apart and put together, without the package ------------------------------------


@dataclass
class Parts:
    """A file as what it is made of; texts are JSON texts, so that they may be invalid."""

    entries: dict[str, Any]
    metadata: dict[str, Any]
    header: dict[str, Any]
    data: bytes
    splices: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: bytes) -> Parts:
        (length,) = struct.unpack("<Q", raw[:8])
        entries = json.loads(raw[8 : 8 + length])
        metadata = entries.pop("__metadata__")
        return cls(entries, metadata, json.loads(metadata[KEY]), raw[8 + length :])

    def spliced(self, text: str) -> Any:
        """A value that becomes this JSON text, which may be an invalid one."""
        mark = f"@@{len(self.splices)}@@"
        self.splices[mark] = text
        return mark

    def dumps(self, value: Any) -> str:
        text = json.dumps(value)
        for mark, raw in self.splices.items():
            text = text.replace(json.dumps(mark), raw)
        return text

    def raw(self, *, anew: bool) -> bytes:
        """The file; with the checksum made anew, or as it was stored."""
        metadata = dict(self.metadata)
        if KEY in metadata:
            metadata[KEY] = self.dumps(self.header)
        if anew and CHECKSUM in metadata:
            metadata[CHECKSUM] = self.checksum()
        header = self.dumps({"__metadata__": metadata, **self.entries})
        encoded = header.encode(errors="surrogatepass")
        return struct.pack("<Q", len(encoded)) + encoded + self.data

    def checksum(self) -> str:
        digest = hashlib.sha256(self.dumps(self.header).encode(errors="surrogatepass"))
        for name, entry in sorted(self.entries.items()):
            try:
                start, end = entry["data_offsets"]
                dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
                stored = self.data[start:end]
            except (TypeError, KeyError, ValueError):
                continue
            digest.update(f"\n{name!r} {dtype} {shape}\n".encode() + stored)
        return digest.hexdigest()


# --- mutations ----------------------------------------------------------------------------------

TEXTS = [
    *("null", "true", "false", "0", "1", "-1", "2", "3", "5", "9", "33", "14000", "1.0", "1.5"),
    *("-0.0", "1e5", "1e999", "1e-320", "NaN", "Infinity", "-Infinity", "2147483648", "1e400"),
    *("9223372036854775808", "1" * 30, "1" * 5000, "1" * 100_000),
    *('""', '"x"', '"True"', '"1"', '"same"', '"reflect"', '"yx"', '"zyx"', '"\\u0000"'),
    *('"\\ud800"', '"' + "a" * 5000 + '"', '"' + "\\u00e9" * 100_000 + '"'),
    *("[]", "{}", "[0]", "[1, 1]", "[true, false]", "[1.5, 2]", "[[1]]", "[-1, 0]", "[3, 3, 3]"),
    *("[2, 1]", "[0, 0]", "[1, 1, 1, 1]", "[0, 1, 2]", "[1e30, 2]", "[" + "1," * 50_000 + "1]"),
    *('{"a": 1, "a": 2}', '{"a": {}}', ",", '{"a":' * 5000 + "1" + "}" * 5000),
    *("[" * 50 + "]" * 50, "[" * 3000 + "]" * 3000, "[" * 100_000),
    '{"offset": [0, 0], "size": [1, 1], "image_size": [2, 2]}',
]
"""JSON texts that a value is replaced with: other types, extremes, invalid ones."""
BYTE_MUTATIONS = [
    *("flip", "flip", "flip", "set", "cut", "insert", "delete", "swap", "repeat", "zero"),
    *("append", "length"),
]
FIELDS = [
    *("radius", "fourier", "align_corners", "swap_sizes", "window", "order", "value_range"),
    *("radius_center", "calls", "groups", "padding_mode", "output_padding", "spiral", "a" * 5000),
    *("channels", "kind", "axes", "octaves", "period", "centring", "center", "normalized"),
]
"""Names that a field is given, or that are added."""
CONVENTIONS = [
    *('"radius": true', '"radius": 1', '"order": "yx"', '"align_corners": false', '"fourier": 1'),
    *('"align_corners": 0', '"value_range": [0, 3]', '"value_range": [0, true]', '"fourier": 32'),
    *('"value_range": [-1e300, 1e300]', '"swap_sizes": true', '"radius_center": 0.5'),
    '"window": {"offset": [1, 1], "size": [2, 2], "image_size": [9, 9]}',
    '"window": {"offset": [1, 1.5], "size": [2, 2], "image_size": [9, 9]}',
    '"window": {"offset": [-2.25, 0], "size": [2.5, 2], "image_size": [9, 9]}',
    '"window": {"offset": [1, true], "size": [2, 2], "image_size": [9, 9]}',
    '"window": {"offset": [1, 1e300], "size": [2, 2], "image_size": [9, 9]}',
    '"window": {"offset": [1, 1], "size": [0, 2], "image_size": [9, 9]}',
    *('"channels": [{"kind": "axes"}]', '"channels": [{"kind": "axes", "axes": "yx"}]'),
    *('"channels": [{"kind": "radius", "center": [0, 1]}]', '"channels": [{"kind": "solar"}]'),
    *('"channels": [{"kind": "fourier", "octaves": 1.0}]', '"channels": {"kind": "axes"}'),
    '"channels": [{"kind": "axes", "value_range": [0, true]}, {"kind": "radius"}]',
]
"""Fields of a convention: possible ones and nearly possible ones."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in parsed JSON, as the container and the key in it."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def mutate_json(random_: random.Random, parts: Parts, root: Any) -> str:
    """Change one place of parsed JSON; returns what was done."""
    container, key = random_.choice(list(places(root)))
    text = random_.choice(TEXTS)
    kinds = ["replace"] * 5 + ["remove", "twice", "rename", "add", "add", "deeper", "move"]
    kind = random_.choice(kinds)
    if kind == "replace":
        container[key] = parts.spliced(text)
    elif kind == "remove":
        del container[key]
    elif kind == "deeper":
        container[key] = random_.choice([[container[key]], {"a": container[key]}])
    elif kind == "move":
        other, place = random_.choice(list(places(root)))
        container[key] = copy.deepcopy(other[place])
    elif isinstance(container, list):
        container.insert(key, parts.spliced(text))
    elif kind == "twice":
        value = parts.dumps(container[key])
        second = value if random_.random() < 0.5 else text
        container[key] = parts.spliced(f"{value}, {json.dumps(key)}: {second}")
    elif kind == "rename":
        container[random_.choice([*FIELDS, key + "x", key[:-1]])] = container.pop(key)
    else:
        container[random_.choice(FIELDS)] = parts.spliced(text)
    return kind


def mutate_header(random_: random.Random, parts: Parts) -> str:
    for _ in range(random_.choice([1, 1, 1, 2])):
        kind = mutate_json(random_, parts, parts.header)
    return f"header {kind}"


def mutate_convention(random_: random.Random, parts: Parts) -> str:
    site = random_.choice(list(parts.header["sites"].values()))
    chosen = random_.sample(CONVENTIONS, random_.choice([1, 1, 2]))
    site["coords"] = parts.spliced("{" + ", ".join(chosen) + "}")
    return "convention"


def mutate_outer(random_: random.Random, parts: Parts) -> str:
    root = {"__metadata__": parts.metadata, **parts.entries}
    kind = mutate_json(random_, parts, root)
    parts.metadata = root.pop("__metadata__", {}) if isinstance(root, dict) else {}
    parts.entries = root
    if not isinstance(parts.metadata, dict):
        parts.metadata = {"x": parts.metadata}
    return f"container {kind}"


def mutate_tensors(random_: random.Random, parts: Parts) -> str:
    name = random_.choice(list(parts.entries))
    entry = parts.entries[name]
    start, end = entry["data_offsets"]
    kind = random_.choice(["number", "number", "dtype", "shape", "extra", "lost", "swap", "cast"])
    if kind == "number":
        dtype = DTYPES[entry["dtype"]]
        stored = torch.frombuffer(bytearray(parts.data[start:end]), dtype=dtype)
        number = random_.choice([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30, 6e4, 1e-40])
        if not dtype.is_floating_point:
            number = random_.choice([-1, 0, 2**62])
        stored[random_.randrange(len(stored))] = number
        changed = stored.view(torch.uint8).numpy().tobytes()
        parts.data = parts.data[:start] + changed + parts.data[end:]
    elif kind == "dtype":
        entry["dtype"] = random_.choice([*DTYPES, "I32", "U8", "BOOL", "F8_E4M3", "C64", "F99"])
    elif kind == "shape":
        shape = list(entry["shape"]) or [1]
        random_.shuffle(shape)
        entry["shape"] = random_.choice([shape, shape[::-1], [*shape, 1], [math.prod(shape)], []])
    elif kind == "extra":
        added = random_.choice(["bn.running_mean", "bn.running_var", "x.coord_weight", "x"])
        parts.entries[added] = {
            "dtype": "F32",
            "shape": [4],
            "data_offsets": [len(parts.data), len(parts.data) + 16],
        }
        parts.data += bytes(16)
    elif kind == "lost":
        last = max(parts.entries, key=lambda each: parts.entries[each]["data_offsets"])
        parts.data = parts.data[: parts.entries.pop(last)["data_offsets"][0]]
    elif kind == "swap":
        other = random_.choice(list(parts.entries))
        parts.entries[name], parts.entries[other] = parts.entries[other], parts.entries[name]
    else:  # the same bits under another dtype of the same size
        same_size = {"F32": ["I32", "U32"], "F16": ["BF16"], "BF16": ["F16", "I16"]}
        entry["dtype"] = random_.choice(same_size.get(entry["dtype"], ["F64", "U64"]))
    return f"tensor {kind}"


def mutate_version(random_: random.Random, parts: Parts) -> str:
    """Pretend to be an older or a newer file, with or without a checksum."""
    parts.header["format_version"] = random_.choice([0, 1, 2, 3, 4, 10**6])
    if random_.random() < 0.5:
        parts.metadata.pop(CHECKSUM)
        return "version, checksum removed"
    return "version"


def mutate_bytes(random_: random.Random, raw: bytes) -> tuple[str, bytes]:
    raw_ = bytearray(raw)
    length = len(raw_)
    start = random_.randrange(length)
    end = min(length, start + random_.choice([1, 2, 8, 64, 500]))
    target = random_.randrange(length)
    kind = random_.choice(BYTE_MUTATIONS)
    if kind == "flip":
        for _ in range(random_.choice([1, 1, 1, 2, 8])):
            raw_[random_.randrange(length)] ^= 1 << random_.randrange(8)
    elif kind == "set":
        raw_[start:end] = bytes(random_.randrange(256) for _ in range(end - start))
    elif kind == "cut":
        del raw_[start:]
    elif kind == "insert":
        raw_[start:start] = bytes(random_.randrange(256) for _ in range(end - start))
    elif kind == "delete":
        del raw_[start:end]
    elif kind == "swap":
        other = bytes(raw_[target : target + end - start])
        raw_[target : target + len(other)] = raw_[start : start + len(other)]
        raw_[start : start + len(other)] = other
    elif kind == "repeat":
        raw_[target:target] = raw_[start:end]
    elif kind == "zero":
        raw_[start:end] = bytes(end - start)
    elif kind == "append":
        raw_ += bytes(random_.randrange(256) for _ in range(end - start))
    else:
        near = struct.unpack("<Q", raw[:8])[0] + random_.randrange(-9, 10)
        raw_[:8] = struct.pack("<Q", random_.choice([0, 1, near, 2**31, 2**63, 2**64 - 1]))
    return f"bytes {kind}", bytes(raw_)


def mutated(random_: random.Random, raw: bytes) -> tuple[str, bytes, bool]:
    """What was done, the file, and whether it has the right to be another one."""
    if random_.random() < 0.4:
        kind, changed = mutate_bytes(random_, raw)
        return kind, changed, False
    parts = Parts.of(raw)
    mutate = random_.choices(
        [mutate_header, mutate_convention, mutate_tensors, mutate_outer, mutate_version],
        [6, 1, 2, 2, 1],
    )[0]
    kind = mutate(random_, parts)
    anew = random_.random() < 0.6
    changed = parts.raw(anew=anew)
    if random_.random() < 0.05:
        more, changed = mutate_bytes(random_, changed)
        kind = f"{kind}, {more}"
    return kind, changed, anew or kind.startswith("version, checksum removed")


# --- what came of it ----------------------------------------------------------------------------


class Hang(BaseException):
    """A load that takes far too long."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def state(model: nn.Module) -> list[Any]:
    """All that loading could change: classes, attributes, hooks, code, and values."""
    found: list[Any] = []
    for name, module in model.named_modules():
        attributes = vars(module)
        dicts = {k: list(v.items()) for k, v in attributes.items() if isinstance(v, dict)}
        found.append((name, id(module), type(module)))
        found.append({k: id(v) for k, v in attributes.items()})
        found.append({k: [(key, id(v)) for key, v in items] for k, items in dicts.items()})
        found.append(module.code if isinstance(module, fx.GraphModule) else "")
    found.append({name: tensor.tolist() for name, tensor in model.state_dict().items()})
    return found


def meaning(model: nn.Module) -> list[Any]:
    """All that a file says, as the model has it afterwards."""
    layers = coord_layers(model)
    return [
        [(name, repr(dataclasses.astuple(layer.coords))) for name, layer in layers.items()],
        [(name, chosen_calls(layer)) for name, layer in layers.items()],
        [(name, owned_calls(model).get(layer)) for name, layer in layers.items()],
        {name: tensor.tolist() for name, tensor in model.state_dict().items()},
    ]


def chosen_calls(layer: nn.Module) -> Any:
    return layer.chosen_calls if isinstance(layer, CoordBranch) else None


def what_is_wrong_with(model: nn.Module, raw: bytes) -> str:
    """Check an accepted file's header and tensors, read without the package, against the model."""
    parts = Parts.of(raw)
    layers = coord_layers(model)
    if set(layers) != set(parts.header["sites"]):
        return "other sites than the file's"
    for name, layer in layers.items():
        record = parts.header["sites"][name]
        if wrong := wrong_fields(layer.coords, record["coords"]):
            return f"{name}: {wrong}"
        calls = chosen_calls(layer)
        found = None if calls is None else json.loads(json.dumps(calls.to_dict()))
        if found != record.get("calls"):
            return f"{name}: other calls"
        owned = owned_calls(model).get(layer)
        found = None if owned is None else json.loads(json.dumps(owned.to_dict()))
        # A trace of the model may know better than the file, where it needs none.
        if found != record.get("function") and owned is not None and owned.weight is None:
            return f"{name}: other calls of functions"
        if calls and not all(0 <= index < calls.total for index in calls.indices):
            return f"{name}: calls that are never applied"
    values = dict(model.state_dict())
    for name, layer in layers.items():
        values[f"{name}.coord_weight"] = layer.coord_weight
    for name, entry in parts.entries.items():
        stored = torch.frombuffer(
            bytearray(parts.data[slice(*entry["data_offsets"])]), dtype=DTYPES[entry["dtype"]]
        )
        value = values[name].detach()
        if not torch.equal(value, stored.reshape(entry["shape"]).to(value.dtype)):
            return f"{name}: other values"
        if not value.isfinite().all():
            return f"{name}: not finite"
    return ""


def wrong_fields(coords: ccp.Coordinates, fields: dict[str, Any]) -> str:
    """Compare a convention with the fields of a file, types included."""
    for each in dataclasses.fields(ccp.Coordinates):
        found = getattr(coords, each.name)
        stored = fields.get(each.name, each.default)
        if each.name == "value_range":
            good = [type(v) in (int, float) for v in stored] == [True, True]
            stored, good = tuple(map(float, stored)), good
        elif each.name == "window" and isinstance(stored, dict):
            # Windows may have fractions of pixels. Exact types, as true is an int to isinstance.
            numbers = [value for values in stored.values() for value in values]
            good = all(type(value) in (int, float) for value in numbers)
            # By value: a Window made here would share what the package makes of numbers.
            found = dataclasses.asdict(found) if found else found
            stored = {name: tuple(values) for name, values in stored.items()}
        elif each.name == "channels" and isinstance(stored, list):
            pairs = zip(found, stored, strict=False)
            good = len(found) == len(stored) and all(is_block(*pair) for pair in pairs)
            stored = found if good else stored
        else:
            allowed = (int, float, type(None)) if each.name == "radius_center" else ()
            good = type(stored) in allowed if allowed else type(stored) is type(each.default)
        if not good or found != stored:
            return f"{each.name}={stored!r} was taken for {found!r}"
    return ""


def is_block(block: ccp.ChannelBlock, fields: dict[str, Any]) -> bool:
    """Whether a block is what its fields in a file say, types included."""
    kinds = {"axes": ccp.Axes, "radius": ccp.Radius, "fourier": ccp.Fourier}
    names = {each.name: each.default for each in dataclasses.fields(block)}
    if type(block) is not kinds.get(fields["kind"]) or set(fields) - {*names, "kind"}:
        return False
    for name, default in names.items():
        found, stored = getattr(block, name), fields.get(name, default)
        if isinstance(stored, list):
            if not all(type(value) in (int, float) for value in stored):
                return False
            stored = tuple(map(float, stored))
        kind = float if type(stored) is int and type(found) is float else type(stored)
        if type(found) is not kind or found != stored:
            return False
    return True


@dataclass
class Record:
    """Outcomes by kind of mutation, and every fault in words."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0
    longest: int = 0

    @property
    def cases(self) -> int:
        return sum(self.outcomes.values())

    def table(self) -> str:
        kinds = sorted({kind for kind, _ in self.outcomes})
        columns = ("refused", "accepted as saved", "accepted as another file")
        lines = [f"| mutation | {' | '.join(columns)} |", "|---" * 4 + "|"]
        for kind in kinds:
            numbers = [f"{self.outcomes[kind, column]:,}" for column in columns]
            lines.append(f"| {kind} | {' | '.join(numbers)} |")
        totals = [sum(self.outcomes[kind, column] for kind in kinds) for column in columns]
        lines.append("| **all** | " + " | ".join(f"**{total:,}**" for total in totals) + " |")
        lines.append("")
        lines.append(
            f"{self.cases:,} cases: {len(self.faults)} faults. The slowest took "
            f"{self.slowest:.2f} s, the longest message has {self.longest} characters."
        )
        return "\n".join(lines)


class Fuzzer:
    """Runs cases.

    Args:
        folder: For the files.
        seed: Of the mutations.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.path = folder / "mutated.safetensors"
        self.seed = seed
        self.subjects = subjects(folder)
        self.targets: dict[tuple[str, bool], nn.Module] = {}
        self.record = Record()
        self.expected: dict[str, list[Any]] = {}
        for subject in self.subjects:
            self.path.write_bytes(subject.raw)
            self.expected[subject.name] = meaning(ccp.load_coords_(subject.fresh(), self.path))

    def run(self, cases: range) -> Record:
        for case in cases:
            self.run_case(case)
        return self.record

    def run_case(self, case: int) -> None:
        random_ = random.Random(f"{self.seed} {case}")
        subject = random_.choice(self.subjects)
        is_patched = random_.random() < 0.3
        kind, raw, may_differ = mutated(random_, subject.raw)
        self.path.write_bytes(raw)
        target = subject.name, is_patched
        if target not in self.targets:
            self.targets[target] = subject.patched() if is_patched else subject.fresh()
        model = self.targets[target]
        before = state(model)
        started = time.perf_counter()
        try:
            with warnings.catch_warnings(), alarm(5 * MOST_SECONDS):
                warnings.simplefilter("ignore")
                ccp.load_coords_(model, self.path)
        except CoordConvPatchError as error:
            outcome, wrong = "refused", ""
            self.record.longest = max(self.record.longest, len(str(error)))
            if len(str(error)) > LONGEST_MESSAGE:
                wrong = f"a message of {len(str(error))} characters"
        except (Exception, Hang) as error:
            outcome, wrong = "refused", f"{type(error).__name__}: {str(error)[:200]}"
        else:
            del self.targets[target]
            outcome, wrong = self.accepted(subject, model, raw, may_differ)
        seconds = time.perf_counter() - started
        self.record.slowest = max(self.record.slowest, seconds)
        if outcome == "refused" and state(model) != before:
            wrong = f"{wrong}; refused, but the model has changed"
        if seconds > MOST_SECONDS:
            wrong = f"{wrong}; it took {seconds:.1f} s"
        checksum = "" if kind.startswith("bytes") else ", checksum anew" if may_differ else ""
        self.record.outcomes[kind.split(",")[0] + checksum, outcome] += 1
        if wrong:
            self.record.faults.append(f"case {case} of {subject.name}, {kind}: {wrong.strip('; ')}")

    def accepted(
        self, subject: Subject, model: nn.Module, raw: bytes, may_differ: bool
    ) -> tuple[str, str]:
        if meaning(model) == self.expected[subject.name]:
            return "accepted as saved", ""
        if not may_differ:
            return "accepted as another file", "damage was taken for what was saved"
        return "accepted as another file", what_is_wrong_with(model, raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = Fuzzer(Path(folder), options.seed).run(range(options.cases))
    print(record.table())
    for fault in record.faults:
        print(f"- {fault}")


if __name__ == "__main__":
    main()
