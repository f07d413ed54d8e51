"""One tiny model of every family, and a loss that reaches all of it."""

import torch
from torch import Tensor, nn

from genvision.models.dit import DiT
from genvision.models.llamagen import LlamaGen
from genvision.models.mage import MAGE
from genvision.models.maskgit import MaskGIT
from genvision.models.rar import RAR
from genvision.tokenizers.kl import KLTokenizer
from genvision.tokenizers.titok import TiTok
from genvision.tokenizers.vit import ViTok
from genvision.tokenizers.vq import VQTokenizer

TOKENS = dict(codebook_size=16, grid_size=4, hidden_dim=16, num_heads=2, num_classes=5)
MODELS = {
    "llamagen": (LlamaGen, TOKENS | dict(depth=2, mlp_multiple_of=8)),
    "rar": (RAR, TOKENS | dict(depth=2)),
    "maskgit": (MaskGIT, TOKENS | dict(depth=2, mlp_multiple_of=8)),
    "maskgit_mlm": (MaskGIT, TOKENS | dict(depth=2, block="post_norm", mlp="gelu", head="mlm", num_registers=0)),
    "mage": (MAGE, TOKENS | dict(depth=2, decoder_dim=16, decoder_depth=1, decoder_num_heads=2)),
    "dit": (DiT, dict(input_size=4, in_channels=2, hidden_dim=16, depth=2, num_heads=2, num_classes=5, norm="rms", use_qk_norm=True)),
    "vq": (
        VQTokenizer,
        dict(image_size=8, codebook_size=16, codebook_dim=4, base_channels=4, encoder_multipliers=(1, 2), num_res_blocks=1)
        | dict(z_channels=4, norm_groups=2),
    ),
    "kl": (KLTokenizer, dict(image_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)),
    "vitok": (
        ViTok,
        dict(image_size=8, patch_size=4, position_embedding="learned", code_width=2, encoder_width=12, encoder_depth=2, encoder_heads=2)
        | dict(decoder_width=12, decoder_depth=1, decoder_heads=2),
    ),
    "titok": (
        TiTok,
        dict(image_size=8, patch_size=4, num_latent_tokens=3, token_dim=4, codebook_size=16, encoder_dim=16, encoder_depth=2)
        | dict(encoder_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2),
    ),
}
"""Name to class and options."""


def tiny(name: str, *, seed: int = 0, **changes: object) -> nn.Module:
    """With a start of its own for each seed, and no trained tensor at zero, so that a gradient reaches every weight."""
    kind, options = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(**(options | changes))
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def output(model: nn.Module, num: int = 2) -> Tensor:
    """Of a forward pass in the model's present mode, from inputs that never change."""
    draw = torch.Generator().manual_seed(1)
    if hasattr(model, "spec"):
        size = model.spec.image_size
        return model(torch.rand(num, 3, size, size, generator=draw) * 2 - 1).reconstruction
    labels = torch.arange(num) % model.num_classes
    if isinstance(model, DiT):
        return model(torch.randn(num, *model.code_shape, generator=draw), torch.full((num,), 0.5), labels)
    codes = torch.randint(model.config.codebook_size, (num, model.num_tokens), generator=draw)
    if isinstance(model, LlamaGen):
        return model(codes[:, :-1], labels)
    if isinstance(model, RAR):
        return model(codes, labels)
    return model(codes.where(torch.rand(codes.shape, generator=draw) < 0.5, model.mask_id), labels)


def train_step(model: nn.Module) -> None:
    """One step of Adam, in training mode, over what has a gradient."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    output(model).square().mean().backward()
    optimizer.step()
