"""The stage folders lie at the top of the checkout, are imported as `genvision.*`, and travel inside the wheel."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tokenizers", "samplers", "eval")


@pytest.mark.parametrize("stage", STAGES)
def test_stage_folder_is_not_a_package_by_itself(stage):
    assert (ROOT / stage).is_dir() and not (ROOT / stage).is_symlink()
    assert not (ROOT / stage / "__init__.py").exists(), f"{stage}/__init__.py would shadow the package `{stage}` on PyPI"


def test_no_test_folder_is_a_package():
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests/tokenizers/__init__.py would shadow the package `tokenizers` on PyPI"


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_module_has_a_name_of_the_standard_library(stage):
    # running such a file by its path would put its folder first on sys.path
    names = {path.stem for path in (ROOT / stage).glob("*.py")}
    assert not names & set(sys.stdlib_module_names)


@pytest.mark.parametrize("order", ["genvision.tokenizers.quantizers, tokenizers", "tokenizers, genvision.tokenizers.quantizers"])
def test_hugging_face_tokenizers_still_imports_from_the_repo_root(order):
    try:
        metadata.version("tokenizers")
    except metadata.PackageNotFoundError:
        pytest.skip("Hugging Face tokenizers is not installed")
    check = f"import {order}; assert hasattr(tokenizers, 'Tokenizer'), tokenizers.__path__"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_type_checkers_find_the_stages_by_links():
    for stage in STAGES:
        assert (ROOT / "typings" / "genvision" / stage).resolve() == ROOT / stage


def test_the_wheel_holds_every_stage_and_works_elsewhere(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("genvision-*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)

    modules = sorted(_module_names())
    assert {name.split(".")[1] for name in modules} >= {*STAGES, "cli", "pipeline", "data", "models", "training"}
    files = (path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml"))
    recipes = sorted(path.as_posix() for path in files if path.parent.name != "accelerate")
    assert recipes
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
from importlib import import_module
for name in {modules!r}:
    module = import_module(name)
    assert module.__file__.startswith({str(site)!r}), module.__file__
from genvision.config import load_train_config, recipe_path, shipped_recipes
assert shipped_recipes() == {recipes!r}, shipped_recipes()
for name in shipped_recipes():
    assert str(recipe_path(name)).startswith({str(site)!r})
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def _module_names() -> list[str]:
    """Every module of the checkout, by the name it is imported under."""
    inside = [path.relative_to(ROOT) for path in (ROOT / "genvision").rglob("*.py")]
    stages = [Path("genvision") / path.relative_to(ROOT) for stage in STAGES for path in (ROOT / stage).rglob("*.py")]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in inside + stages]
    return [name for name in names if name not in ("genvision", "genvision.__main__")]
