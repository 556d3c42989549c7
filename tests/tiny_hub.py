"""Tiny random checkpoints in a hub's layouts: config.json, safetensors, tokenizer.json, chat template.

The tensor tables are written out here, independent of rgpu, because the oracles of tests/vectors rest on them.
"""

import json
import struct
from pathlib import Path

import numpy as np

from .tiny import PLAIN, QWEN2_SPLIT, QWEN35_SPLIT, SPECIAL, TEMPLATE, VOCAB, bpe, draw, token_id

# ---- checkpoints as a hub has them ----


def hub_config(arch: str, k: bool = False, mtp: bool = False) -> dict:
    """The text part of config.json; `k` makes every row a multiple of 256, so that K-quants apply."""
    hidden, width = (256, 256) if k else (64, 32)
    config = dict(
        hidden_size=hidden, num_attention_heads=4, num_key_value_heads=2, head_dim=64 if k else 32, num_experts=8,
        num_experts_per_tok=3, moe_intermediate_size=width, max_position_embeddings=4096, tie_word_embeddings=False,
        vocab_size=VOCAB, bos_token_id=None, eos_token_id=token_id("<|im_end|>"), pad_token_id=token_id("<|endoftext|>"),
        rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False, dtype="float32",
    )  # fmt: skip
    if arch == "qwen3moe":
        return config | dict(
            model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], num_hidden_layers=3, intermediate_size=4 * width,
            norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], rope_theta=1e6, sliding_window=None,
        )  # fmt: skip
    d = 64 if k else 16
    rope = dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25, mrope_interleaved=True)
    return config | dict(
        model_type="qwen3_5_moe_text", architectures=["Qwen3_5MoeForCausalLM"], num_hidden_layers=4, attn_output_gate=True,
        full_attention_interval=4, layer_types=["linear_attention"] * 3 + ["full_attention"], linear_conv_kernel_dim=4,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=d, linear_value_head_dim=d,
        shared_expert_intermediate_size=512 if k else 96, mtp_num_hidden_layers=int(mtp), mtp_use_dedicated_embeddings=False,
        rope_parameters=rope | dict(mrope_section=[3, 3, 2] if k else [2, 1, 1]),
    )  # fmt: skip


def attention_shapes(c: dict, layer: str, gated: bool) -> dict[str, tuple[int, ...]]:
    d, n_q, n_kv = c["head_dim"], c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    return {
        layer + "self_attn.q_proj.weight": (n_q * (2 if gated else 1), c["hidden_size"]),
        layer + "self_attn.k_proj.weight": (n_kv, c["hidden_size"]),
        layer + "self_attn.v_proj.weight": (n_kv, c["hidden_size"]),
        layer + "self_attn.o_proj.weight": (c["hidden_size"], n_q),
        layer + "self_attn.q_norm.weight": (d,),
        layer + "self_attn.k_norm.weight": (d,),
    }


def delta_net_shapes(c: dict, layer: str) -> dict[str, tuple[int, ...]]:
    net, hidden, n_head = layer + "linear_attn.", c["hidden_size"], c["linear_num_value_heads"]
    n_value = n_head * c["linear_value_head_dim"]
    channels = 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"] + n_value
    return {
        net + "in_proj_qkv.weight": (channels, hidden),
        net + "in_proj_z.weight": (n_value, hidden),
        net + "in_proj_b.weight": (n_head, hidden),
        net + "in_proj_a.weight": (n_head, hidden),
        net + "conv1d.weight": (channels, 1, c["linear_conv_kernel_dim"]),
        net + "A_log": (n_head,),
        net + "dt_bias": (n_head,),
        net + "norm.weight": (c["linear_value_head_dim"],),
        net + "out_proj.weight": (hidden, n_value),
    }


def feed_forward_shapes(c: dict, layer: str) -> dict[str, tuple[int, ...]]:
    n_expert, hidden, width = c["num_experts"], c["hidden_size"], c["moe_intermediate_size"]
    shapes = {
        layer + "input_layernorm.weight": (hidden,),
        layer + "post_attention_layernorm.weight": (hidden,),
        layer + "mlp.gate.weight": (n_expert, hidden),
        layer + "mlp.experts.gate_up_proj": (n_expert, 2 * width, hidden),
        layer + "mlp.experts.down_proj": (n_expert, hidden, width),
    }
    if shared := c.get("shared_expert_intermediate_size"):
        shapes |= {layer + f"mlp.shared_expert.{part}_proj.weight": (shared, hidden) for part in ("gate", "up")}
        shapes[layer + "mlp.shared_expert.down_proj.weight"] = (hidden, shared)
        shapes[layer + "mlp.shared_expert_gate.weight"] = (1, hidden)
    return shapes


def hub_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, float32, under names below the prefix (`mtp.*` and `lm_head.weight` have none)."""
    hidden, gated = config["hidden_size"], config["model_type"] != "qwen3_moe"
    shapes = {"embed_tokens.weight": (VOCAB, hidden), "lm_head.weight": (VOCAB, hidden), "norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        layer, kind = f"layers.{i}.", config.get("layer_types", ["full_attention"] * (i + 1))[i]
        shapes |= feed_forward_shapes(config, layer)
        shapes |= delta_net_shapes(config, layer) if kind == "linear_attention" else attention_shapes(config, layer, gated)
    if config.get("mtp_num_hidden_layers"):
        shapes |= feed_forward_shapes(config, "mtp.layers.0.") | attention_shapes(config, "mtp.layers.0.", gated)
        shapes |= {f"mtp.{name}.weight": (hidden,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
        shapes["mtp.fc.weight"] = (hidden, 2 * hidden)
    tensors = {name: draw(name, shape, seed) for name, shape in shapes.items()}
    for name in tensors if gated else ():
        # The norms of this family are stored as w - 1, except the gated one inside the delta net.
        if "norm" in name and "linear_attn" not in name:
            tensors[name] = tensors[name] - np.float32(1)
    return tensors


def per_expert(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The other layout of checkpoints: one gate_proj, up_proj and down_proj for each expert."""
    out = {}
    for name, x in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out[name] = x
            continue
        prefix, part = name.rsplit(".", 1)
        parts = {"down": x} if part == "down_proj" else {"gate": x[:, : x.shape[1] // 2], "up": x[:, x.shape[1] // 2 :]}
        out |= {f"{prefix}.{e}.{p}_proj.weight": m[e] for p, m in parts.items() for e in range(len(x))}
    return out


def hub_checkpoint(
    folder, arch: str = "qwen35moe", *, k=False, nested=False, experts="stacked", shards=1, mtp=False, dtype="F32"
) -> Path:
    """Write a checkpoint folder and return it.

    `nested` is the vision-language form (text_config, prefix `model.language_model.`, a tensor of the vision tower),
    `experts` "stacked" or "single", `dtype` F32, F16 or BF16 (cut off, not rounded), `shards` the number of safetensors files.
    """
    folder, config = Path(folder), hub_config(arch, k, mtp)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = hub_tensors(config)
    tensors = per_expert(tensors) if experts == "single" else tensors
    prefix = "model.language_model." if nested else "model."
    named = {name if name.startswith(("mtp.", "lm_head")) else prefix + name: x for name, x in tensors.items()}
    if nested:
        outer = dict(model_type="qwen3_5_moe", architectures=["Qwen3_5MoeForConditionalGeneration"], text_config=config)
        vision = dict(model_type="qwen3_5_moe_vision", depth=1, hidden_size=32, num_heads=2)
        config = outer | dict(vision_config=vision | dict(out_hidden_size=config["hidden_size"]), tie_word_embeddings=False)
        named["model.visual.patch_embed.proj.weight"] = draw("visual", (32, 3, 2, 16, 16), 0)
    names = list(named)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    files = files if shards > 1 else {"model.safetensors": names}
    for file, part in files.items():
        safetensors(folder / file, {name: named[name] for name in part}, dtype)
    if shards > 1:
        index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sampling = dict(eos_token_id=[token_id("<|im_end|>"), token_id("<|endoftext|>")], temperature=1.0, top_k=20, top_p=0.95)
    for file, content in (
        ("config.json", config), ("generation_config.json", sampling), ("tokenizer.json", tokenizer(arch)),
        ("tokenizer_config.json", tokenizer_config()),
    ):  # fmt: skip
        (folder / file).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    """Write one safetensors file: u64 length, JSON directory, data."""
    as_stored = {
        "F32": lambda x: x,
        "F16": lambda x: x.astype(np.float16),
        "BF16": lambda x: (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16),
    }[dtype]
    directory, data, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, x in tensors.items():
        data.append(as_stored(x).tobytes())
        directory[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [end, end + len(data[-1])]}
        end += len(data[-1])
    header = json.dumps(directory).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(data))


def tokenizer(arch: str) -> dict:
    """tokenizer.json."""
    vocabulary, merges = bpe()
    split = {"Regex": QWEN2_SPLIT if arch == "qwen3moe" else QWEN35_SPLIT}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    pre = [dict(type="Split", pattern=split, behavior="Isolated", invert=False), byte_level]
    return dict(
        version="1.0", truncation=None, padding=None, normalizer={"type": "NFC"}, post_processor=None,
        added_tokens=[dict(id=token_id(t), content=t, **flags, special=t in SPECIAL) for t in SPECIAL + PLAIN],
        pre_tokenizer=dict(type="Sequence", pretokenizers=pre), decoder=byte_level,
        model=dict(
            type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=False,
            byte_fallback=False, ignore_merges=False, vocab={t: i for i, t in enumerate(vocabulary)},
            merges=[list(m) for m in merges],
        ),
    )  # fmt: skip


def tokenizer_config() -> dict:
    """tokenizer_config.json."""
    return dict(
        tokenizer_class="Qwen2Tokenizer", add_bos_token=False, bos_token=None, eos_token="<|im_end|>",
        pad_token="<|endoftext|>", unk_token=None, model_max_length=4096, chat_template=TEMPLATE,
    )  # fmt: skip


