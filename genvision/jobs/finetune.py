"""`genvision finetune`: a model folder's generator becomes an image classifier, which is tested and kept."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.finetune_config import FinetuneConfig
from genvision.eval.finetune_report import finetune_chart
from genvision.eval.finetuning import FinetuneResult
from genvision.eval.finetuning import finetune as run
from genvision.eval.report import write_json, write_text
from genvision.eval.trunk_classifier import TrunkClassifier
from genvision.jobs.output import check_one_process, check_output
from genvision.pipeline import ImagePipeline
from genvision.processes import choose_device
from genvision.tokenizers.base import content_hash
from genvision.training.state import save_tensors

SCHEMA = "genvision.classifier/1"
WEIGHTS, FACTS = "classifier.safetensors", "classifier.json"


def finetune_folder(
    model: Path,
    train: str,
    test: str,
    out: Path,
    *,
    config: FinetuneConfig,
    num_workers: int = 0,
    device: str | None = None,
    show_progress: bool = True,
) -> FinetuneResult:
    """Fine-tune, test, and write `results.json`, `curve.svg`, `classifier.json` and `classifier.safetensors`: all of them at the end.

    Raises:
        UserError: `out` is occupied; see `ImagePipeline.from_pretrained` and `genvision.eval.finetuning.finetune`.
    """
    check_one_process("genvision finetune")
    check_output(out)
    if num_workers < 0:
        raise UserError(f"workers must be at least 0, got {num_workers}")
    sets = open_source(train), open_source(test)
    pipeline = ImagePipeline.from_pretrained(model)
    hashes = _hashes(pipeline)
    classifier, result = run(
        pipeline.generator,
        pipeline.tokenizer,
        *sets,
        config=config,
        model=str(model),
        hashes=hashes,
        num_workers=num_workers,
        device=choose_device(device),
        show_progress=show_progress,
    )
    facts = {
        "schema": SCHEMA,
        "model": str(model),
        **{f"{name}_hash": digest for name, digest in hashes.items()},
        "layer": result.layer,
        "num_classes": result.num_classes,
        "label_names": sets[1].label_names,
        "image_size": result.image_size,
    }
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        save_tensors(part / WEIGHTS, classifier.trained_tensors())
        write_text(part / FACTS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        write_text(part / "curve.svg", finetune_chart(result))
        write_json(result, part / "results.json")
        part.replace(out)  # takes the place of an empty folder, too
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return result


def load_classifier(folder: str | Path, model: str | Path | ImagePipeline) -> tuple[TrunkClassifier, list[str]]:
    """A fine-tuned classifier in eval mode, and the names of its classes: it maps images [B, 3, H, W] in [-1, 1] to logits [B, K].

    Args:
        folder: written by `genvision finetune`.
        model: the model folder that was fine-tuned, or its pipeline, whose generator takes over the new weights.

    Raises:
        UserError: files are missing or damaged, or the model is another one.
    """
    folder = Path(folder)
    facts = _read_facts(folder / FACTS)
    pipeline = model if isinstance(model, ImagePipeline) else ImagePipeline.from_pretrained(model)
    for name, digest in _hashes(pipeline).items():
        if digest != facts[f"{name}_hash"]:
            raise UserError(f"{folder}: was fine-tuned from another {name} than that of the model given; give {facts['model']}")
    classifier = TrunkClassifier(pipeline.generator, pipeline.tokenizer, layer=facts["layer"], num_classes=facts["num_classes"])
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({' '.join(str(error).split())[:120]}); fine-tune again") from error
    classifier.load_trained(tensors, str(folder / WEIGHTS))
    return classifier.eval(), facts["label_names"]


def _hashes(pipeline: ImagePipeline) -> dict[str, str]:
    return {"generator": content_hash(pipeline.generator), "tokenizer": content_hash(pipeline.tokenizer)}


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read; give a folder written by genvision finetune") from error
    wanted = {"model", "generator_hash", "tokenizer_hash", "layer", "num_classes", "label_names"}
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA or wanted - set(facts):
        raise UserError(f"{path}: no classifier of this version ({SCHEMA}); give a folder written by genvision finetune")
    return facts
