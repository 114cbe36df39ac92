"""Folders of checkpoints of other implementations, and of their targets, to convert."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import linear, silu
from transformers import LlamaConfig


def write_source(
    folder: Path, weights: dict[str, torch.Tensor], config: dict, file: str = "model.safetensors"
) -> Path:
    """Write a folder with weights and config of another implementation."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file(weights, folder / file)
    return folder


def write_target(folder: Path, **overrides) -> Path:
    """A target's folder with nothing but its config."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": 2}
    special = {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 6}
    LlamaConfig(
        **{"vocab_size": 211, "max_position_embeddings": 777, **sizes, **special, **overrides}
    ).save_pretrained(folder)
    return folder


def make_eagle_weights(
    hidden: int = 64, wide: int = 96, heads: int = 4, kv_heads: int = 4, head_dim: int = 16, biases: str = ""
) -> dict[str, torch.Tensor]:
    """Random weights of an EAGLE-1/2 head.

    Args:
        hidden: Hidden size.
        wide: Width of the MLP.
        heads: Attention heads.
        kv_heads: Key/value heads.
        head_dim: Size of one of them.
        biases: Which of the attention projections have biases, e.g. "qkv".
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    layer = {f"self_attn.{letter}_proj.weight": random(size, hidden) for letter, size in rows.items()}
    layer |= {f"self_attn.{letter}_proj.bias": random(rows[letter]) for letter in biases}
    layer["self_attn.o_proj.weight"] = random(hidden, heads * head_dim)
    layer |= {"mlp.gate_proj.weight": random(wide, hidden), "mlp.up_proj.weight": random(wide, hidden)}
    layer |= {"mlp.down_proj.weight": random(hidden, wide), "post_attention_layernorm.weight": random(hidden).exp()}
    return {"fc.weight": random(hidden, 2 * hidden), **{f"layers.0.{name}": value for name, value in layer.items()}}


def run_eagle(
    weights: dict[str, torch.Tensor],
    embeddings: torch.Tensor,
    features: torch.Tensor,
    head_dim: int,
    rope_theta: float,
    epsilon: float,
) -> torch.Tensor:
    """What an EAGLE-1/2 head computes, written down from the paper (arXiv 2401.15077), in plain torch.

    Args:
        weights: Its weights by their original names.
        embeddings: Embeddings of the tokens at t+1, of shape `(length, hidden)`.
        features: Features at t, of the same shape.
        head_dim: Size of an attention head.
        rope_theta: Base of RoPE.
        epsilon: Epsilon of the RMSNorm.

    Returns:
        Predicted features at t+1, of the same shape.
    """
    length = len(features)
    fused = linear(torch.cat([embeddings, features], dim=-1), weights["fc.weight"], weights.get("fc.bias"))

    def project(letter: str) -> torch.Tensor:
        name = f"layers.0.self_attn.{letter}_proj"
        projected = linear(fused, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        return projected.view(length, -1, head_dim).transpose(0, 1)  # (heads, length, head_dim)

    angles = torch.arange(length)[:, None] / rope_theta ** (torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    query, key, value = rotate(project("q")), rotate(project("k")), project("v")
    key, value = (x.repeat_interleave(len(query) // len(x), dim=0) for x in (key, value))
    scores = query @ key.transpose(1, 2) / head_dim**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(dim=-1) @ value).transpose(0, 1).reshape(length, -1)
    hidden = fused + linear(mixed, weights["layers.0.self_attn.o_proj.weight"])
    norm = hidden * torch.rsqrt(hidden.pow(2).mean(dim=-1, keepdim=True) + epsilon)
    norm = norm * weights["layers.0.post_attention_layernorm.weight"]
    gate, up, down = (weights[f"layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return hidden + linear(silu(linear(norm, gate)) * linear(norm, up), down)
