"""What sampling imports, what importing genvision costs, and importing as if something were not installed."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny

from genvision.lean_import import import_without
from genvision.pipeline import ImagePipeline
from genvision.samplers.autoregressive import AutoregressiveSampler

ROOT = Path(__file__).resolve().parents[1]
UNUSED = [
    *("diffusers.models.autoencoders", "diffusers.models.transformers", "diffusers.pipelines", "diffusers.loaders", "diffusers.hooks"),
    *("genvision.models.dit", "genvision.models.mage", "genvision.tokenizers.kl", "genvision.samplers.diffusion", "genvision.eval"),
    *("transformers", "peft", "torchvision", "timm", "datasets", "pyarrow", "scipy", "sklearn", "pandas", "matplotlib"),
    *("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "sympy", "triton"),
]
"""What drawing tokens and decoding them needs nothing of."""


def in_child(code: str, *words: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages that import `rare`: one of them can do without it."""
    (tmp_path / "rare.py").write_text("")
    for name, text in {
        "thrifty": "try:\n    import rare\nexcept ImportError:\n    rare = None\n",
        "needy": "import needy.first\nimport rare\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        (tmp_path / name / "first.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("rare", "thrifty", "needy")]:
        del sys.modules[name]


def test_the_command_that_samples_tokens_imports_only_what_this_model_needs(tmp_path):
    model = ImagePipeline(tiny("llamagen"), tiny("vq"), AutoregressiveSampler(), list("abcde"))
    model.save_pretrained(tmp_path / "model")
    code = "import sys\nfrom genvision.cli import main\nmain()\nprint(*sys.modules, sep='\\n')"
    words = ["sample", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--num", "2"]
    imported = set(in_child(code, *words).splitlines())
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert "genvision.models.llamagen" in imported
    assert not imported & set(UNUSED)


def test_importing_genvision_takes_no_time():
    code = "import time\nbegan = time.process_time()\nimport genvision\nprint(time.process_time() - began)"
    seconds = [float(in_child(code)) for _ in range(3)]
    print(f"import genvision: {min(seconds):.3f} s of a processor")
    assert min(seconds) < 0.15


def test_what_is_hidden_is_left_out_and_can_be_imported_afterwards(packages):
    import_without("thrifty.first", ["rare"])
    import rare
    import thrifty

    assert thrifty.rare is None and "thrifty.first" in sys.modules
    assert rare.__name__ == "rare"


def test_a_package_that_needs_what_is_hidden_is_imported_in_full_by_its_user(packages):
    import_without("needy", ["rare"])
    assert not {"needy", "needy.first", "rare"} & set(sys.modules)
    import needy

    assert needy.rare is sys.modules["rare"]


def test_what_is_imported_already_stays(packages):
    import rare

    import_without("thrifty", ["rare"])
    import thrifty

    assert thrifty.rare is rare
    import_without("thrifty", ["needy"])
    assert sys.modules["thrifty"] is thrifty
