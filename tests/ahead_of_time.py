"""Compile Triton kernels for cards that are not here, and tell what the machine code needs.

No driver is asked. What this shows is that a kernel compiles, fits and does not spill; not that it is right, nor how fast it is. It
happens in one child process, since a kernel that was decorated for the interpreter, as the other tests want it, cannot be compiled.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that a block may have, for each compute capability."""


@dataclass(frozen=True)
class Case:
    """One kernel at one choice of types and constants."""

    kernel: str
    """`package.module:name`."""
    signature: dict[str, str]
    """Types of the arguments that are no constants, in Triton's words: `*bf16`, `i32`, `fp32`."""
    constexprs: dict[str, Any]
    """Numbers, booleans, strings and None; an argument that Triton would find to be None or 1 stands here, too."""
    divisible: tuple[str, ...]
    """Arguments (pointers in bytes, integers) that are multiples of 16."""
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one case needs on one card."""

    capability: int
    shared: int
    """Bytes of shared memory of a block."""
    local: int
    """Bytes of a thread's stack: registers that were spilled, and arrays that found no place in registers."""
    vector_loads: int
    """Loads of 128 bits and more from global memory, asynchronous copies among them."""
    cubin: int
    """Bytes of machine code."""


def compile_ahead(cases: Sequence[Case], capabilities: tuple[int, ...] = (80, 90, 100)) -> list[list[Compiled]]:
    """One list for each case, with an entry for each capability; fails with the compiler's words where one does not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    asked = json.dumps({"cases": [asdict(case) for case in cases], "capabilities": capabilities})
    child = subprocess.run([sys.executable, __file__], input=asked, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return [[Compiled(**entry) for entry in entries] for entries in json.loads(child.stdout.splitlines()[-1])]


def _compile(case: Case, capability: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = case.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    names = kernel.arg_names
    wrong = set(names) ^ (case.signature.keys() | case.constexprs.keys())
    assert not wrong, f"{case.kernel}: {sorted(wrong)} are missing in the case or unknown to the kernel"
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in case.constexprs else case.signature[name] for name in names},
        constexprs=case.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = compiled.asm["cubin"]
    return Compiled(capability, compiled.metadata.shared, _stack(code), _vector_loads(compiled.asm["ptx"]), len(code))


def _vector_loads(ptx: str) -> int:
    plain = re.findall(r"ld\.global\S*\.(?:v4\.[bfsu]32|v2\.[bfsu]64|v8\.[bfsu]32|v4\.[bfsu]64|b128)", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\S* \[[^\]]*\], \[[^\]]*\], (?:16|0x10)\b", ptx)
    return len(plain) + len(copies)


def _stack(code: bytes) -> int:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        words = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        listing = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"STACK:(\d+)", listing)
    assert found, listing
    return max(map(int, found))


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    answer = [[asdict(_compile(Case(**case), capability)) for capability in asked["capabilities"]] for case in asked["cases"]]
    print(json.dumps(answer))
