"""Which part may import which: tokenizers -> genvision -> samplers -> eval, jobs and the command line above all of them."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tokenizers", "genvision", "samplers", "eval")
GROUND = {"layers", "kernels", "images", "errors", "processes", "progress", "streams", "user_cache", "weights"}
ABOVE = {"cli", "pipeline", "demo", "jobs", "bench", "card", "config", "presets", "__main__"}
"""Within genvision/: what every stage may use and what uses none; and what stands above all four stages."""

MODULES = sorted(
    path.relative_to(ROOT) for stage in STAGES for path in (ROOT / stage).rglob("*.py") if path != ROOT / "genvision" / "__init__.py"
)


def level(parts: tuple[str, ...]) -> int:
    """0 ground floor, 1 .. 4 the stages, 5 above them; `parts` of a path or of an import name, without suffix."""
    if parts[0] == "genvision" and len(parts) > 1:
        if parts[1] in STAGES and parts[1] != "genvision":
            return 1 + STAGES.index(parts[1])
        if parts[1] in GROUND:
            return 0
        return 5 if parts[1] in ABOVE else 1 + STAGES.index("genvision")
    return 1 + STAGES.index(parts[0])


def imports(path: Path) -> list[tuple[str, ...]]:
    """Every import of ours in a module, those inside functions too: ("genvision", "data", "order"), say."""
    found: list[str] = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import absolutely"
            # `from genvision import __version__` takes no module
            found += [f"{node.module}.{alias.name}" if node.module == "genvision" else str(node.module) for alias in node.names]
    return [tuple(name.split(".")) for name in found if name.split(".")[0] == "genvision" and name != "genvision.__version__"]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_only_what_stands_below_it(path):
    own = level(path.with_suffix("").parts)
    for name in imports(path):
        if len(name) > 1:
            other = level(name)
            assert other <= own and (own > 0 or other == 0), f"{path} imports {'.'.join(name)}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_stage_is_never_imported_by_its_bare_name(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        assert not {name.split(".")[0] for name in names} & {"tokenizers", "samplers", "eval", "configs"}, path


def test_the_rule_is_not_empty():
    assert len(MODULES) > 40
    assert level(("genvision", "tokenizers", "vq")) == level(("tokenizers", "vq")) == 1
    assert level(("genvision", "data", "order")) < level(("samplers", "base")) < level(("genvision", "eval", "job"))
    assert level(("genvision", "images")) == 0 and level(("genvision", "jobs", "sample")) == 5


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["smaple"]])
def test_nothing_heavy_is_imported_before_there_is_work(words):
    code = f"""
import sys
sys.argv = ["genvision", *{words!r}]
from genvision.cli import main
try:
    main()
except SystemExit:
    pass
heavy = {{"torch", "numpy", "diffusers", "accelerate", "jsonargparse", "datasets", "yaml", "PIL"}} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_options_of_a_command_are_shown_without_torch():
    code = """
import sys
from genvision.cli import main
try:
    main(["sample", "--help"])
except SystemExit as exit:
    assert exit.code == 0
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_help_answers_at_once():
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "genvision", "--help"], cwd=ROOT, check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    print(f"genvision --help: {min(seconds):.2f} s")
    assert min(seconds) < 2.0  # half a second is promised; the rest is for a busy machine
