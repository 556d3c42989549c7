"""Qwen3 Mixture-of-Experts (Qwen3-30B-A3B and its relatives): plain attention with normed heads, routed experts only."""

import numpy as np

from . import blocks
from .base import Model, Numbers, T


class Qwen3Moe(Model):
    arch = "qwen3moe"
    hub_types = ("qwen3_moe",)

    @classmethod
    def metadata_from_hub(cls, config):
        blocks.refuse(
            config, norm_topk_prob=(True,), hidden_act=(None, "silu"), attention_bias=(None, False),
            use_sliding_window=(None, False), mlp_only_layers=(None, []), decoder_sparse_step=(None, 1),
        )  # fmt: skip
        keys = {
            "block_count": np.uint32(config["num_hidden_layers"]),
            **blocks.hub_attention(config, blocks.hub_rope(config)),
            "feed_forward_length": np.uint32(config["intermediate_size"]),
            **blocks.hub_experts(config),
        }
        return {f"{cls.arch}.{key}": value for key, value in keys.items()}

    @classmethod
    def hparams(cls, metadata, n_vocab):
        return Numbers(metadata, cls.arch).hparams(n_vocab)

    @classmethod
    def tensors(cls, hp):
        n_q, n_kv, d = hp.n_head * hp.n_embd_head_k, hp.n_head_kv * hp.n_embd_head_k, hp.n_embd_head_k
        table = [
            T("token_embd.weight", (hp.n_vocab, hp.n_embd), "embed_tokens.weight"),
            T("output.weight", (hp.n_vocab, hp.n_embd), "lm_head.weight", optional=True),
            T("output_norm.weight", (hp.n_embd,), "norm.weight"),
        ]
        for i in range(hp.n_layer):
            b, hub = f"blk.{i}.", f"layers.{i}."
            table += [
                T(b + "attn_norm.weight", (hp.n_embd,), hub + "input_layernorm.weight"),
                T(b + "attn_q.weight", (n_q, hp.n_embd), hub + "self_attn.q_proj.weight"),
                T(b + "attn_k.weight", (n_kv, hp.n_embd), hub + "self_attn.k_proj.weight"),
                T(b + "attn_v.weight", (hp.n_head_kv * hp.n_embd_head_v, hp.n_embd), hub + "self_attn.v_proj.weight"),
                T(b + "attn_q_norm.weight", (d,), hub + "self_attn.q_norm.weight"),
                T(b + "attn_k_norm.weight", (d,), hub + "self_attn.k_norm.weight"),
                T(b + "attn_output.weight", (hp.n_embd, hp.n_head * hp.n_embd_head_v), hub + "self_attn.o_proj.weight"),
                T(b + "ffn_norm.weight", (hp.n_embd,), hub + "post_attention_layernorm.weight"),
                *blocks.routed_tensors(hp, b, hub),
            ]
        return table

    @classmethod
    def workspace(cls, hp):
        n_q, n_kv = hp.n_head * hp.n_embd_head_k, hp.n_head_kv * hp.n_embd_head_k
        attn, n_v = hp.n_head * hp.n_embd_head_v, hp.n_head_kv * hp.n_embd_head_v
        return {**blocks.workspace(hp), "q": n_q, "k": n_kv, "v": n_v, "attn": attn}

    def mix(self, run, layer):
        ops, ws, hp = run.ops, run.ws, self.hp
        ops.rms_norm(ws.h, ws.x, layer.attn_norm, hp.norm_rms_eps)
        ops.matmul(ws.q, layer.attn_q, ws.h)
        ops.matmul(ws.k, layer.attn_k, ws.h)
        ops.matmul(ws.v, layer.attn_v, ws.h)
        q, k = blocks.heads(ws.q, hp.n_head), blocks.heads(ws.k, hp.n_head_kv)
        ops.rms_norm(q, q, layer.attn_q_norm, hp.norm_rms_eps)
        ops.rms_norm(k, k, layer.attn_k_norm, hp.norm_rms_eps)
        blocks.attend(run, layer, q, k, blocks.heads(ws.v, hp.n_head_kv))
        ops.matmul(ws.out, layer.attn_output, ws.attn)

    def ffn(self, run, layer):
        run.ops.rms_norm(run.ws.h, run.ws.x, layer.ffn_norm, self.hp.norm_rms_eps)
        blocks.route(run, layer)
        run.ops.zero(run.ws.out)
        run.experts.ffn(run, layer)  # adds to out
