"""`genvision statistics`: the statistics of a data set as a file, to be used as a reference later or elsewhere."""

from pathlib import Path

from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.job import EvaluationOptions, load_networks, software_versions
from genvision.eval.measurement import measure
from genvision.eval.protocols import load_protocol
from genvision.eval.reference import GAUSSIAN_OF
from genvision.eval.reference_files import write_statistics
from genvision.eval.sets import find_image_size
from genvision.processes import from_main, process_state


def write_data_statistics(data: str, out: Path, *, options: EvaluationOptions) -> str:
    """Measure mean and covariance of the rows that the protocol's metrics compare, and write them with their provenance.

    Returns:
        One line for the user.

    Raises:
        UserError: `out` is there already or is no .safetensors, or the data cannot be measured.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: statistics are written as NAME.safetensors; choose such a name")
    if out.exists():
        raise UserError(f"{out}: is there already; choose another --out, or delete it")
    protocol = load_protocol(options.protocol)
    metrics = tuple(metric for metric in protocol.choose(options.metrics) if metric in GAUSSIAN_OF)
    if not metrics:
        raise UserError(f"protocol {protocol.name} compares no statistics with these metrics; name fid among them")
    source = open_source(data)
    if len(source) < 2:
        raise UserError(f"{data}: statistics need at least 2 images, got {len(source)}; give more images")
    size = find_image_size(source, options.image_size)
    networks = load_networks(protocol, metrics, options)
    names = frozenset(GAUSSIAN_OF[metric] for metric in metrics)
    measured = measure(
        source,
        networks,
        moments=names,
        image_size=options.image_size,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        show_progress=options.show_progress,
        description="statistics",
    )
    state = process_state()
    content_hash = from_main(source.content_hash)
    if state.is_main_process:
        facts = {
            "protocol": protocol.name,
            "data": data,
            "content_hash": content_hash,
            "num_images": len(source),
            "image_size": size,
            "crop": options.sets.crop,
            "versions": software_versions(),
            "networks": networks.identities(names),
        }
        write_statistics(out, {name: measured.moments(name).gaussian() for name in sorted(names)}, facts)
    state.wait_for_everyone()
    return (
        f"{out}: statistics of {len(source):,} images of {size}x{size} pixels under protocol {protocol.name} ({', '.join(sorted(names))})"
    )
