"""What a figure of speed depends on besides the code: the processor, its load, and the versions of the packages."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from genvision.bench.timing import NUM_THREADS

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "torch-fidelity", "cache-dit")


def describe_machine() -> str:
    """The processor, how many cores of it, and the threads that are used."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    return f"{names[0]}, {os.cpu_count()} cores, {NUM_THREADS} thread{'s' if NUM_THREADS > 1 else ''} used"


def describe_versions() -> str:
    """Python, and those packages that are installed."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
