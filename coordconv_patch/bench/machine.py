"""The machine that a measurement was made on, in words that mean something elsewhere."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["Machine", "describe_machine"]

_PACKAGES = ("coordconv-patch", "torch", "onnx", "onnxruntime-gpu", "onnxruntime")


@dataclass(frozen=True)
class Machine:
    """Processor, memory, GPUs and versions; no name of the machine or of its user.

    Attributes:
        cores: Processor cores that this process may use.
        memory_gb: Main memory in units of 10^9 bytes, rounded; 0 if unknown.
        gpus: Names of the GPUs that torch sees, each with its memory.
        system: Operating system and architecture.
        versions: Version of Python and of each package, by name.
    """

    processor: str
    cores: int
    memory_gb: int
    gpus: tuple[str, ...]
    system: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        return asdict(self) | {"gpus": list(self.gpus)}

    def lines(self) -> tuple[str, str]:
        """Two lines for a report: the machine, and the versions."""
        parts = [f"{self.processor}, {self.cores} cores"]
        if self.memory_gb:
            parts.append(f"{self.memory_gb} GB")
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return ", ".join([*parts, *self.gpus, self.system]), versions


def describe_machine(packages: Sequence[str] = ()) -> Machine:
    """Describe this machine, also the versions of further packages, if they are installed."""
    versions = {"Python": platform.python_version()}
    for name in (*_PACKAGES, *packages):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        processor=_processor(),
        cores=_cores(),
        memory_gb=_memory_gb(),
        gpus=_gpus(),
        system=f"{platform.system()} {platform.machine()}",
        versions=versions,
    )


def _processor() -> str:
    """The model name; Python's own ``platform.processor()`` says "x86_64" on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gb() -> int:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9)
    except (AttributeError, ValueError, OSError):
        return 0


def _gpus() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in gpus)
