"""Pieces that several architectures share, as plain functions; a model that differs writes its own ten lines instead."""

import numpy as np

from ..errors import UnsupportedModel
from .base import T

# ---- views of activations ----


def heads(x, n_head):
    """[n_tokens, n_head * d] -> [n_tokens, n_head, d]."""
    return x.reshape(x.shape[0], n_head, -1)


def halves(x, n_head):
    """[n_tokens, n_head * 2d] -> first and second half of every head, each [n_tokens, n_head, d]."""
    x = heads(x, n_head)
    d = x.shape[2] // 2
    return x[:, :, :d], x[:, :, d:]


# ---- steps ----


def attend(run, layer, q, k, v):
    """Rotate q and k, append k and v to the layer's cache, attend; returns ws.attn as [n_tokens, n_head, d_v]."""
    cache = run.state.layers[layer.index]
    run.ops.rope(q, run.pos, run.rope_freqs)
    run.ops.rope(k, run.pos, run.rope_freqs)
    run.ops.store_kv(cache, k, v, run.pos)
    out = heads(run.ws.attn, q.shape[1])
    run.ops.attention(out, q, cache, run.pos, 1.0 / np.sqrt(q.shape[2]))
    return out


def route(run, layer):
    """ws.h -> the ids and weights of this step's experts: softmax over all, the k largest, renormalised."""
    run.ops.matmul(run.ws.router, layer.ffn_gate_inp, run.ws.h)
    run.ops.route(run.ids, run.weights, run.ws.router, run.near)


# ---- tables ----


def workspace(hp):
    """The activations that every model here has: residual stream, normed input, a branch's output, router logits."""
    return {"x": hp.n_embd, "h": hp.n_embd, "out": hp.n_embd, "router": hp.n_expert}


def routed_tensors(hp, b, hub):
    """Router and routed experts; `experts` names the part, `hub` the prefix common to both checkpoint layouts."""
    wide, tall = (hp.n_expert, hp.n_ff_exp, hp.n_embd), (hp.n_expert, hp.n_embd, hp.n_ff_exp)
    experts = hub + "mlp.experts"
    return [
        T(b + "ffn_gate_inp.weight", (hp.n_expert, hp.n_embd), hub + "mlp.gate.weight"),
        T(b + "ffn_gate_exps.weight", wide, experts, experts="gate"),
        T(b + "ffn_up_exps.weight", wide, experts, experts="up"),
        T(b + "ffn_down_exps.weight", tall, experts, experts="down"),
    ]


# ---- a checkpoint's config.json -> GGUF keys (below the architecture's prefix) ----


def refuse(config, **computed):
    """UnsupportedModel for settings that would change the result unseen; `computed`: the values we compute, by key."""
    other = [f"{key} = {config.get(key)!r}" for key, values in computed.items() if config.get(key) not in values]
    if other:
        raise UnsupportedModel(f"config.json asks for what is not computed here: {', '.join(other)}")


def hub_rope(config):
    """The rope parameters, whichever of their homes they live in; UnsupportedModel for a scaled rope."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise UnsupportedModel(f"config.json asks for rope scaling '{kind}', which is not computed here: remove it to use the "
                               "context that the model was trained for")  # fmt: skip
    return {"rope_theta": config.get("rope_theta", 10000.0), **rope}


def head_dim(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def hub_attention(config, rope):
    """Sizes that every decoder has."""
    n_head = config["num_attention_heads"]
    return {
        "context_length": np.uint32(config["max_position_embeddings"]),
        "embedding_length": np.uint32(config["hidden_size"]),
        "attention.head_count": np.uint32(n_head),
        "attention.head_count_kv": np.uint32(config.get("num_key_value_heads", n_head)),
        "rope.freq_base": np.float32(rope["rope_theta"]),
        "attention.layer_norm_rms_epsilon": np.float32(config["rms_norm_eps"]),
        "attention.key_length": np.uint32(head_dim(config)),
        "attention.value_length": np.uint32(head_dim(config)),
    }


def hub_experts(config):
    """Expert counts and width; newer configurations say `num_local_experts`."""
    n_expert = config.get("num_experts") or config["num_local_experts"]
    return {
        "expert_count": np.uint32(n_expert),
        "expert_used_count": np.uint32(config["num_experts_per_tok"]),
        "expert_feed_forward_length": np.uint32(config["moe_intermediate_size"]),
    }
