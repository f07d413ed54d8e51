"""Which original implementation a state dict comes from, by the names of its tensors."""

import re
from collections.abc import Iterable

DIT = (r"x_embedder\.", r"blocks\.0\.adaLN_modulation\.")
"""DiT, SiT and Model-guidance have these names, and the same shapes; LightningDiT without its switches and REPA without projectors, too."""

SIGNATURES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("titok", (r"latent_tokens", r"encoder\.transformer\.0\."), ()),
    ("vitok", (r"tubelet_embed\.proj\.", r"encoder_to_code\."), ()),
    ("llamagen-vq", (r"encoder\.conv_blocks\.0\.res\.0\.", r"quantize\.embedding\.weight"), ()),
    ("maskgit-vqgan", (r"encoder\.mid\.0\.conv1\.", r"quantize\.embedding\.weight"), (r"encoder\.conv_blocks\.",)),
    ("taming-vqgan", (r"encoder\.mid\.attn_1\.", r"quantize\.embedding\.weight", r"quant_conv\."), ()),
    ("mage-vqgan", (r"encoder\.mid\.block_1\.", r"quantize\.embedding\.weight"), (r"quant_conv\.",)),
    ("autoencoder-kl", (r"(first_stage_model\.)?encoder\.(down_blocks|down)\.0\.",), (r"quantize\.",)),
    ("llamagen-gpt", (r"layers\.0\.attention\.wqkv\.", r"tok_embeddings\."), ()),
    ("diffusers-dit", (r"transformer_blocks\.0\.norm1\.emb\.class_embedder\.", r"proj_out_1\."), ()),
    ("repa-sit", (*DIT, r"projectors\.0\.0\."), ()),
    ("lightningdit", (*DIT, r"feat_rope\.|blocks\.0\.(mlp\.w12|norm1)\."), ()),
    ("dit or sit", DIT, ()),
    ("mage", (r"token_emb\.word_embeddings\.",), ()),
    ("rar", (r"target_aware_pos_embed", r"adaln_before_head\."), ()),
    ("halton-maskgit", (r"tok_emb\.", r"cls_emb\.", r"transformer\.layers\.0\."), ()),
    ("maskgit-bert", (r"model\.embeddings\.word_embeddings\.|out_blocks\.0\.skip_linear\.", r"(model\.)?lm_head\."), ()),
    ("maskgit-jax", (r"params/TransformerLayer_0/", r"params/Embed_0/"), ()),
)
"""Family, patterns that some name must begin with each, patterns that no name may begin with; the first that fits counts."""


def guess_family(names: Iterable[str]) -> str | None:
    """The family that tensor names look like; None where they look like none."""
    names = [re.sub(r"^(module\.|_orig_mod\.)+", "", name) for name in names]  # of data parallelism and torch.compile

    def present(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in names)

    for family, wanted, unwanted in SIGNATURES:
        if all(map(present, wanted)) and not any(map(present, unwanted)):
            return family
    return None
