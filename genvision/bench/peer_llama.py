"""transformers' Llama with the weights of a LlamaGen, drawing tokens in the two ways in which one would have it do so.

Shapes: B images, N tokens, V codebook entries.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.models.llamagen import LlamaGen
from genvision.samplers.guidance import combine

NAMES = {
    "attention.proj": "self_attn.o_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""Layers of a block, and what they are called there."""


def peer_llama(model: LlamaGen) -> Any:
    """LlamaForCausalLM; its words are V tokens, then the classes and the null class, of which the head predicts the tokens only."""
    import transformers

    transformers.logging.set_verbosity_error()
    config, state = model.config, model.state_dict()
    assert model.grid_size is None and model.num_kv_heads == config.num_heads, "a sequence, with keys for every head"
    options: dict[str, Any] = {
        "hidden_size": config.hidden_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "intermediate_size": len(state["blocks.0.mlp.gate.weight"]),
        "vocab_size": config.codebook_size,
        "max_position_embeddings": model.num_tokens + 1,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    words = torch.cat([state["token_embed.weight"], state["condition_embed.table.weight"]])
    peer.model.embed_tokens = nn.Embedding(*words.shape)
    renamed = {"model.embed_tokens.weight": words, "model.norm.weight": state["norm.weight"], "lm_head.weight": state["head.weight"]}
    for i in range(config.depth):
        layer = f"model.layers.{i}."
        q, k, v = state[f"blocks.{i}.attention.qkv.weight"].chunk(3)
        renamed[f"{layer}self_attn.q_proj.weight"] = halves_apart(q, config.num_heads)
        renamed[f"{layer}self_attn.k_proj.weight"] = halves_apart(k, config.num_heads)
        renamed[f"{layer}self_attn.v_proj.weight"] = v
        renamed |= {f"{layer}{theirs}.weight": state[f"blocks.{i}.{ours}.weight"] for ours, theirs in NAMES.items()}
    peer.load_state_dict(renamed)
    peer.generation_config.eos_token_id = None  # all tokens are drawn
    return peer.eval()


def halves_apart(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a projection [C, C] in the order of rotary positions whose pairs are half a head apart, from neighbouring ones."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def generate(peer: Any, labels: Tensor, num_tokens: int, *, scale: float, top_k: int) -> Tensor:
    """int64 [B, N] as transformers' users draw them; its guidance reads the null rows in passes of their own.

    Args:
        labels: int64 [B].
        top_k: 0 takes the most likely token.
    """
    prompt, null = _prompts(peer, labels)
    options: dict[str, Any] = {"do_sample": True, "top_k": top_k} if top_k else {"do_sample": False}
    if scale != 1:
        options |= {"guidance_scale": scale, "negative_prompt_ids": null}
    tokens: Tensor = peer.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        cache_implementation="static",
        disable_compile=True,
        pad_token_id=0,
        **options,
    )
    return tokens[:, 1:]


def merged_rows(peer: Any, labels: Tensor, num_tokens: int, *, scale: float, top_k: int) -> Tensor:
    """The same by the peer's forward pass in a short loop, conditional and null rows in one batch, with a static cache of exact length."""
    from transformers import StaticCache

    cache = StaticCache(config=peer.config, max_cache_len=num_tokens)
    # the name before transformers 5.24
    name = "cache" if "cache" in inspect.signature(peer.forward).parameters else "past_key_values"
    rows, tokens = torch.cat(_prompts(peer, labels)), []
    for _ in range(num_tokens):
        logits = peer(rows, use_cache=True, logits_to_keep=1, **{name: cache}).logits[:, -1].float()  # [2B, V]
        conditional, null = logits.chunk(2)
        logits = combine(conditional, null, scale)
        if top_k:
            values, order = logits.topk(top_k)
            chosen = order.gather(1, F.softmax(values, dim=-1).multinomial(1))[:, 0]
        else:
            chosen = logits.argmax(-1)
        tokens.append(chosen)
        rows = chosen.repeat(2).unsqueeze(1)
    return torch.stack(tokens, dim=1)


def _prompts(peer: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The words of the classes and of the null class, each [B, 1]."""
    first_class, last_word = peer.config.vocab_size, len(peer.model.embed_tokens.weight) - 1
    return (first_class + labels).unsqueeze(1), torch.full((len(labels), 1), last_word)
