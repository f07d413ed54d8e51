"""Do samples show the class that was asked for? A small classifier trained on real images names samples drawn at several guidance scales.

    python benchmarks/class_consistency.py --model runs/flow_cifar10/model --train 'parquet:data/cifar10/train-*.parquet' \
        --test 'parquet:data/cifar10/test-*.parquet' --scales 1,2,4

The classifier's accuracy on real test images is printed first: it is the most that samples can be expected to score.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from genvision.data.sources import open_source
from genvision.eval.classifier import ClassifierConfig, Classifying, build_classifier
from genvision.eval.sets import ArraySource
from genvision.pipeline import ImagePipeline


def share(guessed: np.ndarray, labels: np.ndarray) -> str:
    """Share that is right, with its 95 % interval."""
    right = float((guessed == labels).mean())
    half = 1.96 * (right * (1 - right) / len(labels)) ** 0.5
    return f"{right:6.1%}  [{right - half:.1%}, {right + half:.1%}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", required=True, help="labelled real images for the classifier")
    parser.add_argument("--test", required=True, help="other real images")
    parser.add_argument("--scales", default="1,2,4")
    parser.add_argument("--num", type=int, default=1000, help="samples at each scale, the classes in turn")
    parser.add_argument("--num-test", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=600, help="batches of 128 that the classifier is trained on")
    parser.add_argument("--classifier", type=Path, help="file to keep it in, or to take it from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)

    pipeline = ImagePipeline.from_pretrained(args.model)
    train, test = open_source(args.train), open_source(args.test)
    assert train.label_names == test.label_names == pipeline.label_names, "data and model must name the same classes in the same order"
    classes, size = len(pipeline.label_names), pipeline.image_size
    config = ClassifierConfig(architecture="resnet20", num_steps=args.steps)
    judge = Classifying(
        config=config, num_steps=args.steps, image_size=size, num_classes=classes, num_workers=0, device="cpu", show_progress=True
    )
    if args.classifier is not None and args.classifier.is_file():
        network = build_classifier("resnet20", classes, size, 0).to(memory_format=torch.channels_last).eval()
        network.load_state_dict(load_file(args.classifier))
    else:
        network, loss = judge.train(train, np.arange(classes), "training the classifier")
        print(f"classifier: resnet20, {args.steps} batches, last loss {loss:.3f}")
        if args.classifier is not None:
            save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, args.classifier)
    chosen = np.linspace(0, len(test) - 1, args.num_test).astype(int)
    real = np.stack([np.asarray(test.load(int(i)).convert("RGB")) for i in chosen])
    guessed = judge.rank(network, ArraySource(real, test.labels[chosen], "test"), "real images")[:, 0]
    print(f"real test images     {share(guessed, test.labels[chosen])}")
    labels = np.arange(args.num) % classes
    for scale in map(float, args.scales.split(",")):
        began, parts, calls = time.perf_counter(), [], 0
        for start in range(0, args.num, 100):
            part = range(start, min(start + 100, args.num))
            output = pipeline(labels[part].tolist(), indices=part, seed=args.seed, guidance_scale=scale, output_type="np")
            parts.append(output.images)
            calls = int(output.network_calls[0])
        images = np.concatenate(parts)
        guessed = judge.rank(network, ArraySource(images, labels, "samples"), "samples")[:, 0]
        each = ", ".join(f"{name} {float((guessed[labels == i] == i).mean()):.0%}" for i, name in enumerate(test.label_names))
        print(
            f"guidance {scale:<5g}       {share(guessed, labels)}  {calls} network calls, {time.perf_counter() - began:.0f} s; {each}",
            flush=True,
        )


if __name__ == "__main__":
    main()
