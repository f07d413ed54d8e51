"""How much memory a process takes that does nothing but load a model and draw two images. Linux only, which counts it in /proc.

Runs in a process of its own: what others have freed, or still hold, would be counted otherwise.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from genvision.errors import UserError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
NUM_IMAGES = 2


class DrawingMemory(NamedTuple):
    """Bytes beyond what the process took before it loaded the model."""

    loaded: int
    """Resident when the model is ready."""
    peak: int
    """Highest from then on, to the end of drawing."""


def drawing_memory(model: Path, weights: str) -> DrawingMemory:
    """Measure in a new process.

    Args:
        model: pipeline folder.
        weights: as `ImagePipeline.prepare` takes them; float32 leaves the model as it was loaded.

    Raises:
        UserError: this system does not say what a process takes, or the process failed.
    """
    if not CLEAR.exists():
        raise UserError("--memory reads /proc, which this system does not have; leave it out")
    code = f"from genvision.jobs.drawing_memory import report; report({str(model)!r}, {weights!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--memory: a process that draws failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}")
    return DrawingMemory(*json.loads(done.stdout.splitlines()[-1]))


def report(model: str, weights: Any) -> None:
    """What the child process prints: both numbers as JSON."""
    import torch

    from genvision.pipeline import ImagePipeline

    labels = torch.zeros(NUM_IMAGES, dtype=torch.int64)
    before = _resident("VmRSS")
    pipeline = ImagePipeline.from_pretrained(model)
    if weights != "float32":
        pipeline.prepare(weights, batch_size=NUM_IMAGES)
    loaded = _resident("VmRSS")
    CLEAR.write_text(RESET_PEAK)
    pipeline.draw_codes(labels)
    print(json.dumps([loaded - before, _resident("VmHWM") - before]))


def _resident(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
