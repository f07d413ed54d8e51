"""genvision: class-conditional image synthesis in one codebase: tokenizers, generators, samplers, evaluation."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout the stage folders (tokenizers/, samplers/, eval/) lie beside this package; in a wheel they lie inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "tokenizers").is_dir():
    __path__.append(str(_root))
