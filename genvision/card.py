"""The model card of a pipeline folder: what the model is, where it comes from, how to use it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genvision import __version__
from genvision.tokenizers.base import content_hash


def write_card(path: Path, generator: Any, tokenizer: Any, sampler: Any, label_names: Sequence[str], provenance: dict[str, Any]) -> None:
    """Write README.md with the Hub's metadata header.

    Args:
        provenance: facts that identify the model: data, steps, versions; shown as a table, with the hashes of both networks.
    """
    spec = tokenizer.spec
    options = {name: value for name, value in dict(sampler.config).items() if not name.startswith("_")}
    hashes = {"generator_hash": content_hash(generator), "tokenizer_hash": content_hash(tokenizer)}
    facts = {"genvision": __version__, **provenance, **hashes}
    size = generator.image_size(spec.downsample, spec.image_size)
    places = (
        f"one for {spec.downsample} x {spec.downsample} pixels"
        if spec.num_tokens is None
        else f"a sequence of {spec.num_tokens} for an image"
    )
    codes = f"{spec.codebook_size} codes" if spec.discrete else f"latents of {spec.channels} channels"
    rows = "\n".join(f"| {name.replace('_', ' ')} | `{_short(value)}` |" for name, value in facts.items())
    classes = ", ".join(label_names[:12]) + (", ..." if len(label_names) > 12 else "")
    what = f"A class-conditional image generator for {len(label_names)} classes ({classes})."
    if generator.is_unconditional:
        what = "An unconditional image generator: labels make no difference."
    path.write_text(f"""---
library_name: genvision
pipeline_tag: unconditional-image-generation
tags:
- {"un" if generator.is_unconditional else "class-"}conditional-image-generation
- {type(generator).__name__.lower()}
---

# {type(generator).__name__}, {generator.num_parameters_million:.1f}M parameters, {size} x {size} pixels

{what}
Tokenizer: {type(tokenizer).__name__}, {codes}, {places}.

```python
from genvision.pipeline import ImagePipeline

pipe = ImagePipeline.from_pretrained("path/to/this/folder")
images = pipe(class_labels=[{json.dumps(label_names[0])}] * 4, seed=0).images
```

Default sampling protocol ({type(sampler).__name__}):

```json
{json.dumps(options, indent=2)}
```

## Where it comes from

| | |
|---|---|
{rows}
""")


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text.replace("|", "\\|")
