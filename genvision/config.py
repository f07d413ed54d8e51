"""Dataclasses <-> YAML <-> command line, and errors that name file, key and the nearest right name.

The only user of jsonargparse.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import yaml
from docstring_parser import parse as parse_docstring
from docstring_parser import parse_from_object
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from genvision.errors import UserError

if TYPE_CHECKING:
    from genvision.training.config import TrainConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)

MODELS = {
    "llamagen": ("generator", "genvision.models.llamagen", "LlamaGen"),
    "rar": ("generator", "genvision.models.rar", "RAR"),
    "maskgit": ("generator", "genvision.models.maskgit", "MaskGIT"),
    "mage": ("generator", "genvision.models.mage", "MAGE"),
    "dit": ("generator", "genvision.models.dit", "DiT"),
    "vq": ("tokenizer", "genvision.tokenizers.vq", "VQTokenizer"),
    "vitok": ("tokenizer", "genvision.tokenizers.vit", "ViTok"),
    "kl": ("tokenizer", "genvision.tokenizers.kl", "KLTokenizer"),
    "titok": ("tokenizer", "genvision.tokenizers.titok", "TiTok"),
}
"""`model.name` in a training configuration: stage, module, class."""


FROM_DATA = {"image_size", "codebook_size", "grid_size", "sequence_length", "input_size", "in_channels", "num_classes"}
"""Model options that follow from the data (tokenizer stage) or from the tokenizer (generator stage)."""
ALLOW_CHANGE = "--allow-change"
NOT_CONFIGURED = ("data", "order", "tokenizer")
"""What a checkpoint knows of a run beside its options, and `--allow-change` may name."""
ACCELERATE = "accelerate/"
"""Of the shipped YAML files, those that `accelerate launch` reads; they are no recipes."""
OPEN_KEYS = ("model.quantizer_options",)
"""Keys that hold a dictionary whose keys depend on another option."""


def model_class(name: str) -> Any:
    """The class behind `model.name`."""
    _, module, class_name = MODELS[name]
    return getattr(import_module(module), class_name)


Command = Callable[..., None]


def run_command(name: str, function: Command, argv: Sequence[str]) -> None:
    """Parse `argv` for a sub-command and call it.

    Positional-or-keyword parameters become positional arguments, `*parameters` one or more of them, keyword-only ones options
    (`on_bad_image` is `--on-bad-image`), and a keyword-only dataclass an option for each of its fields; types and defaults come from the
    signature, help from the docstring.

    Raises:
        UserError: an argument is unknown, missing or of a wrong type.
    """
    parser = ArgumentParser(prog=f"genvision {name}", description=inspect.getdoc(function).split("\n\n")[0], exit_on_error=False)  # type: ignore[union-attr]
    helps = {parameter.arg_name: parameter.description for parameter in parse_docstring(inspect.getdoc(function) or "").params}
    types = get_type_hints(function)
    groups: dict[str, list[str]] = {}
    several: str | None = None
    for parameter in inspect.signature(function).parameters.values():
        kind, options = types[parameter.name], dict[str, Any](help=helps.get(parameter.name))
        required = parameter.default is inspect.Parameter.empty
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            several = parameter.name
            parser.add_argument(parameter.name, type=kind, nargs="+", **options)
        elif dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            groups[parameter.name] = [field.name for field in dataclasses.fields(kind)]
            _add_fields(parser, kind)
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            parser.add_argument(parameter.name, type=kind, **options, **({} if required else {"nargs": "?", "default": parameter.default}))
        else:
            _add_option(parser, parameter.name, kind, parameter.default, options["help"])
    known = [string for action in parser._actions for string in action.option_strings]
    try:
        values = parser.parse_args(list(argv)).as_dict()
    except (argparse.ArgumentError, ValueError) as error:
        raise UserError(f"{name}: {_explained(str(error), known)}") from error
    for group, names in groups.items():
        values[group] = types[group](**{field: values.pop(field) for field in names})
    function(*(values.pop(several) if several else ()), **values)


def _add_fields(parser: ArgumentParser, kind: type) -> None:
    helps, types = attribute_docstrings(kind), get_type_hints(kind)
    for field in dataclasses.fields(kind):
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        _add_option(parser, field.name, types[field.name], default, helps[field.name])


def _add_option(parser: ArgumentParser, name: str, kind: Any, default: Any, text: str | None) -> None:
    if kind is bool:
        parser.add_argument(_option(name), action="store_true", help=text)
    elif default is inspect.Parameter.empty:
        parser.add_argument(_option(name), type=kind, required=True, help=text)
    else:
        parser.add_argument(_option(name), type=kind, default=default, help=text)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def load_train_config(argv: Sequence[str]) -> tuple["TrainConfig", frozenset[str]]:
    """The training configuration of a command line: `--config FILE`, then `--dotted.key value` over it.

    Returns:
        The configuration, and the keys behind `--allow-change`.

    Raises:
        UserError: file, key and value are named.
    """
    argv = list(argv)
    allowed = _take_allowed(argv)
    file, content = _read_config_file(argv)
    in_file = dict(_flat(content))
    on_line = {word.removeprefix("--").split("=")[0]: word for word in argv if word.startswith("--")}
    model = _peek("model.name", argv, in_file)
    if model is None and {"-h", "--help"} & set(argv):
        print(_train_help())
        raise SystemExit(0)
    if model not in MODELS:
        where = f"{file}: " if file else ""
        raise UserError(f"{where}model.name is {model!r}; one of {', '.join(MODELS)} is needed{_nearest(str(model), list(MODELS))}")
    parser = _train_parser(str(model), str(_peek("model.path", argv, in_file) or "ddpm"))
    known = sorted({action.dest for action in parser._actions} - {"help", "print_config", "config"})
    for key in allowed:
        if key not in known and key not in NOT_CONFIGURED and not any(key.startswith(f"{option}.") for option in OPEN_KEYS):
            raise UserError(f"--allow-change {key}: there is no such key{_nearest(key, [*known, *NOT_CONFIGURED])}")
    sections = {key.split(".")[0] for key in known if "." in key}
    for key in [*in_file, *on_line]:
        if key in sections and (key in on_line or in_file[key] != {}):
            raise UserError(f"{'' if key in on_line else f'{file}: '}{key} is a section, so keys are expected below it, not a value")
        if any(key.startswith(f"{option}.") for option in OPEN_KEYS):
            continue  # its class checks them
        if key not in known and key not in ("config", "help", "h", "print_config"):
            raise UserError(f"{f'{file}: ' if key in in_file else ''}unknown key '{key}'{_nearest(key, known)}")
    try:
        values = parser.parse_args(argv).as_dict()
        config = _train_config(values)
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        message = _explained(str(error), known)
        from_file = file and not message.startswith(("unrecognized ", "argument ", *on_line))
        raise UserError(f"{f'{file}: ' if from_file else ''}{message}") from error
    return config, allowed


def _take_allowed(argv: list[str]) -> frozenset[str]:
    """The keys behind every `--allow-change`, which is taken out of `argv`."""
    allowed: set[str] = set()
    while places := [i for i, word in enumerate(argv) if word.partition("=")[0] == ALLOW_CHANGE]:
        i = places[0]
        _, equals, value = argv[i].partition("=")
        value = value if equals else argv[i + 1] if i + 1 < len(argv) else ""
        if not value or value.startswith("--"):
            raise UserError(f"{ALLOW_CHANGE}: a key is expected behind it, optim.lr for example")
        allowed |= set(value.split(","))
        del argv[i : i + (1 if equals else 2)]
    return frozenset(allowed)


def _train_help() -> str:
    return (
        "usage: genvision train --config FILE [--dotted.key value ...] [--allow-change KEY]\n\n"
        "Train a tokenizer or a generator from a YAML recipe: a path, or a shipped one by its name:\n\n"
        + "\n".join(f"  {name}" for name in shipped_recipes())
        + "\n\n  --config FILE --help shows every key of that recipe's model. The same command again goes on from the newest checkpoint;"
        + "\n  with other values it is refused, unless --allow-change KEY accepts another result."
    )


@cache  # reading the docstrings takes 0.2 s
def _train_parser(model: str, path: str) -> ArgumentParser:
    """`path` is that of a diffusion transformer, which decides about loss and sampler."""
    from genvision.training.config import DataConfig, LoopConfig, OptimConfig, ScoresConfig, TrainConfig
    from genvision.training.lora import LoRAConfig
    from genvision.training.ternary import TernaryConfig

    stage = MODELS[model][0]
    parser = ArgumentParser(
        prog="genvision train",
        description="Train a tokenizer or a generator. All keys may stand in the YAML file too.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; keys on the command line win over it")
    helps = attribute_docstrings(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name in ("stage", "output_dir", "seed", "tokenizer", "init_from"):
            required = field.default is dataclasses.MISSING
            options = {"required": True} if required else {"default": field.default}
            kind = {"stage": Literal[stage]}.get(field.name, get_type_hints(TrainConfig)[field.name])
            parser.add_argument(f"--{field.name}", type=kind, help=helps[field.name], **options)
    parser.add_argument("--model.name", type=Literal[tuple(MODELS)], required=True, help="which model")
    skip = {"image_size"} if stage == "tokenizer" else FROM_DATA
    parser.add_class_arguments(model_class(model), "model", skip=skip)
    parser.add_class_arguments(DataConfig, "data")
    parser.add_class_arguments(OptimConfig, "optim")
    parser.add_class_arguments(LoopConfig, "train")
    parser.add_class_arguments(ScoresConfig, "scores")
    parser.add_class_arguments(LoRAConfig, "lora")
    parser.add_class_arguments(TernaryConfig, "ternary")
    loss, sampler = _loss_and_sampler(model, path)
    if loss is not None:
        parser.add_class_arguments(loss, "loss")
    if sampler is not None:
        parser.add_class_arguments(sampler, "sampler")
        parser.add_argument("--model.num_classes", type=int | None, default=None, help="as many as the data names, unless told")
    return parser


def _loss_and_sampler(model: str, path: str) -> tuple[type | None, type | None]:
    """Classes whose options stand below `loss` and `sampler`."""
    if MODELS[model][0] == "tokenizer":
        from genvision.training.tokenizer_loss import TokenizerLossConfig

        return TokenizerLossConfig, None
    if model == "llamagen":
        from genvision.samplers.autoregressive import AutoregressiveSampler

        return None, AutoregressiveSampler
    if model == "rar":
        from genvision.objectives.permuted import PermutedLossConfig
        from genvision.samplers.autoregressive import AutoregressiveSampler

        return PermutedLossConfig, AutoregressiveSampler
    if model in ("maskgit", "mage"):
        from genvision.objectives.masked import MaskedLossConfig
        from genvision.samplers.masked import MaskedSampler

        return MaskedLossConfig, MaskedSampler
    if path == "ddpm":
        from genvision.objectives.diffusion import DiffusionLossConfig
        from genvision.samplers.diffusion import DiffusionSampler

        return DiffusionLossConfig, DiffusionSampler
    from genvision.objectives.flow import FlowLossConfig
    from genvision.samplers.flow import FlowSampler

    return FlowLossConfig, FlowSampler


def _train_config(values: dict[str, Any]) -> "TrainConfig":
    from genvision.training.config import DataConfig, LoopConfig, OptimConfig, ScoresConfig, TrainConfig
    from genvision.training.lora import LoRAConfig
    from genvision.training.ternary import TernaryConfig

    return TrainConfig(
        **{name: values[name] for name in ("stage", "output_dir", "seed", "tokenizer", "init_from", "model")},
        data=DataConfig(**values["data"]),
        optim=OptimConfig(**values["optim"]),
        train=LoopConfig(**values["train"]),
        scores=ScoresConfig(**values["scores"]),
        lora=LoRAConfig(**values["lora"]),
        ternary=TernaryConfig(**values["ternary"]),
        loss=values.get("loss") or {},
        sampler=values.get("sampler") or {},
    )


def _read_config_file(argv: list[str]) -> tuple[str, dict[str, Any]]:
    """The file behind `--config`, looked up among the shipped recipes too, and its content; in `argv` its place comes first."""
    places = [i for i, word in enumerate(argv) if word.partition("=")[0] == "--config"]
    if len(places) > 1:
        raise UserError("--config: was given twice; one YAML file is expected")
    for i in places:
        _, equals, value = argv[i].partition("=")
        value = value if equals else argv[i + 1] if i + 1 < len(argv) else ""
        if not value:
            raise UserError("--config: a YAML file is expected behind it")
        path = recipe_path(value)
        del argv[i : i + (1 if equals else 2)]
        argv[:0] = ["--config", str(path)]  # what stands later wins
        try:
            content = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds no keys; see configs/ for examples")
        return value, content
    return "", {}


def recipe_path(name: str | Path) -> Path:
    """A YAML file by path, or by its name within the shipped `configs/`.

    Raises:
        UserError: there is no such file.
    """
    import genvision

    path = Path(name)
    if path.is_file():
        return path
    inside = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    for root in genvision.__path__:
        if (Path(root) / "configs" / inside).is_file():
            return Path(root) / "configs" / inside
    raise UserError(f"{name}: no such file, and no shipped recipe of that name; see configs/")


def shipped_recipes() -> list[str]:
    """Names of the recipes in `configs/`, as `--config` takes them from any folder."""
    import genvision

    roots = [Path(root) / "configs" for root in genvision.__path__]
    names = {path.relative_to(root).as_posix() for root in roots for path in root.rglob("*.yaml")}
    return sorted(name for name in names if not name.startswith(ACCELERATE))


def save_config(config: Any, path: Path) -> None:
    """Write a dataclass as YAML with every value resolved; it loads again to an equal one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False))
    part.replace(path)  # never half of it


def flat_values(config: Any) -> dict[str, Any]:
    """Dotted keys and plain values of a configuration, a dataclass or what YAML holds."""
    return dict(_flat(_plain(dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config)))  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if not (key in ("loss", "sampler", "tokenizer", "init_from") and not item)}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def attribute_docstrings(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    return {p.arg_name: p.description or "" for p in parse_from_object(cls).params if p.args[0] == "attribute"}


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _peek(key: str, argv: Sequence[str], in_file: dict[str, Any]) -> Any:
    """A value from the command line, or else from the file."""
    for i, word in enumerate(argv):
        if word.startswith(f"--{key}="):
            return word.partition("=")[2]
        if word == f"--{key}" and i + 1 < len(argv):
            return argv[i + 1]
    return in_file.get(key)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _explained(message: str, known: Sequence[str]) -> str:
    """jsonargparse's and argparse's messages in one plain line."""
    message = " ".join(message.split())
    message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("typing.", "")
    message = re.sub(r'^Parser key "([^"]+)": ', lambda key: f"{_option(key[1]) if _option(key[1]) in known else key[1]}: ", message)
    message = re.sub(r"Expected an? (.+?)\. Got value: (.*)$", r"expected \1, got '\2'", message)
    union = re.match(r"(.*?)Does not validate against any of the Union subtypes Subtypes: \[(.+)\] Errors: .* Given value: (.*)$", message)
    if union:
        types = re.sub(r"NoneType", "null", union[2].replace(", NoneType", " or NoneType"))
        return f"{union[1]}expected {types}, got '{union[3]}'"
    missing = re.match(r"the following arguments are required: (.*)$", message)
    if missing:
        names = [_option(name) if _option(name) in known else name for name in missing[1].split(", ")]
        return f"{', '.join(names)} must be given"
    unknown = re.match(r"unrecognized arguments?: (-\S+)", message)
    return message + _nearest(unknown[1], known) if unknown else message
