"""Qwen3.5 / Qwen3.6 Mixture-of-Experts: gated delta net in three layers of four, gated attention in the fourth.

Every layer ends in routed experts beside one shared expert. V heads are in the order of GGUF files: V head j uses K head
j mod n_k_head, which the converter's re-ordering (`_v_heads`) establishes.
"""

import numpy as np

from . import blocks
from .base import Model, Numbers, T


class Qwen35Moe(Model):
    arch = "qwen35moe"
    hub_types = ("qwen3_5_moe", "qwen3_5_moe_text")

    # ---- numbers ----

    @classmethod
    def metadata_from_hub(cls, config):
        blocks.refuse(config, norm_topk_prob=(None, True), hidden_act=(None, "silu"), attention_bias=(None, False))
        rope = blocks.hub_rope(config)
        n_layer, n_nextn = config["num_hidden_layers"], config.get("mtp_num_hidden_layers") or 0
        interval = config.get("full_attention_interval") or 4
        kinds = config.get("layer_types") or ["full_attention" if (i + 1) % interval == 0 else "" for i in range(n_layer)]
        recurrent = [kind != "full_attention" for kind in kinds] + [False] * n_nextn
        v_heads, head_v = config["linear_num_value_heads"], config["linear_value_head_dim"]
        sections = [*rope.get("mrope_section", [11, 11, 10]), 0, 0, 0, 0][:4]
        keys = {
            "block_count": np.uint32(n_layer + n_nextn),
            **blocks.hub_attention(config, rope),
            "rope.dimension_sections": np.array(sections, np.int32),
            **blocks.hub_experts(config),
            "expert_shared_feed_forward_length": np.uint32(config["shared_expert_intermediate_size"]),
            **({"nextn_predict_layers": np.uint32(n_nextn)} if n_nextn else {}),
            "ssm.conv_kernel": np.uint32(config["linear_conv_kernel_dim"]),
            "ssm.state_size": np.uint32(config["linear_key_head_dim"]),
            "ssm.group_count": np.uint32(config["linear_num_key_heads"]),
            "ssm.time_step_rank": np.uint32(v_heads),
            "ssm.inner_size": np.uint32(v_heads * head_v),
            "attention.recurrent_layers": np.array(recurrent, np.bool_),
            "full_attention_interval": np.uint32(interval),
            "rope.dimension_count": np.uint32(int(blocks.head_dim(config) * rope.get("partial_rotary_factor", 0.25))),
        }
        return {f"{cls.arch}.{key}": value for key, value in keys.items()}

    @classmethod
    def hparams(cls, metadata, n_vocab):
        read = Numbers(metadata, cls.arch)
        interval, n_block = read.integer("full_attention_interval", 4), read.integer("block_count")
        n_k_head, n_v_head = read.integer("ssm.group_count"), read.integer("ssm.time_step_rank")
        inner, taps = read.integer("ssm.inner_size"), read.integer("ssm.conv_kernel")
        read.demand("full_attention_interval", interval >= 1, interval)
        grouped = n_k_head >= 1 and n_v_head >= 1 and n_v_head % n_k_head == 0
        read.demand("ssm.time_step_rank", grouped, f"{n_v_head} value heads for {n_k_head} key heads")
        read.demand("ssm.inner_size", n_v_head >= 1 and inner % n_v_head == 0, inner)
        read.demand("ssm.conv_kernel", taps >= 2, taps)
        head_k, head_v = read.integer("ssm.state_size"), inner // max(n_v_head, 1)
        for name, size in (("ssm.state_size", head_k), ("ssm.inner_size", head_v)):
            read.demand(name, size % 16 == 0, f"heads of {size}, which is no multiple of 16")
        key, value = read.integer("attention.key_length"), read.integer("attention.value_length")
        read.demand("attention.value_length", key == value, f"{value} beside keys of {key}, whose gate it shares")
        listed = metadata.get(f"{cls.arch}.attention.recurrent_layers")
        if listed is not None:
            good = np.ndim(listed) == 1 and len(listed) == n_block
            read.demand("attention.recurrent_layers", good, f"{np.size(listed)} entries for {n_block} blocks")
        extra = dict(
            recurrent=None if listed is None else tuple(np.ravel(listed).astype(bool).tolist()),
            interval=interval,
            n_ff_shexp=read.integer("expert_shared_feed_forward_length"),
            n_conv=taps,
            n_k_head=n_k_head,
            n_v_head=n_v_head,
            n_embd_k=head_k,
            n_embd_v=head_v,
        )
        return read.hparams(n_vocab, extra)

    @classmethod
    def layer_kind(cls, hp, index):
        e = hp.extra
        recurrent = e.recurrent[index] if e.recurrent else (index + 1) % e.interval != 0
        return "recurrent" if recurrent else "attention"

    # ---- tensors ----

    @classmethod
    def tensors(cls, hp):
        table = [
            T("token_embd.weight", (hp.n_vocab, hp.n_embd), "embed_tokens.weight"),
            T("output.weight", (hp.n_vocab, hp.n_embd), "lm_head.weight", optional=True),
            T("output_norm.weight", (hp.n_embd,), "norm.weight", _plus_one),
        ]
        for i in range(hp.n_layer):
            mixer = cls._attention if cls.layer_kind(hp, i) == "attention" else cls._delta_net
            table += [*mixer(hp, f"blk.{i}.", f"layers.{i}."), *cls._experts(hp, f"blk.{i}.", f"layers.{i}.")]
        for i in range(hp.n_layer_nextn):
            table += cls._mtp(hp, f"blk.{hp.n_layer + i}.", f"mtp.layers.{i}.")
        return table

    @staticmethod
    def _attention(hp, b, hub):
        n_q, n_kv, d = hp.n_head * hp.n_embd_head_k, hp.n_head_kv * hp.n_embd_head_k, hp.n_embd_head_k
        return [
            T(b + "attn_norm.weight", (hp.n_embd,), hub + "input_layernorm.weight", _plus_one),
            T(b + "attn_q.weight", (2 * n_q, hp.n_embd), hub + "self_attn.q_proj.weight"),
            T(b + "attn_k.weight", (n_kv, hp.n_embd), hub + "self_attn.k_proj.weight"),
            T(b + "attn_v.weight", (hp.n_head_kv * hp.n_embd_head_v, hp.n_embd), hub + "self_attn.v_proj.weight"),
            T(b + "attn_q_norm.weight", (d,), hub + "self_attn.q_norm.weight", _plus_one),
            T(b + "attn_k_norm.weight", (d,), hub + "self_attn.k_norm.weight", _plus_one),
            T(b + "attn_output.weight", (hp.n_embd, n_q), hub + "self_attn.o_proj.weight"),
        ]

    @staticmethod
    def _delta_net(hp, b, hub):
        e = hp.extra
        n_key, n_value = e.n_k_head * e.n_embd_k, e.n_v_head * e.n_embd_v
        channels, net = 2 * n_key + n_value, hub + "linear_attn."

        def heads(axis, width=1, start=0):
            return lambda x: _v_heads(x, axis, e.n_k_head, width, start)

        def conv(x):
            return _v_heads(x.reshape(channels, e.n_conv), 0, e.n_k_head, e.n_embd_v, 2 * n_key)

        return [
            T(b + "attn_norm.weight", (hp.n_embd,), hub + "input_layernorm.weight", _plus_one),
            T(b + "attn_qkv.weight", (channels, hp.n_embd), net + "in_proj_qkv.weight", heads(0, e.n_embd_v, 2 * n_key)),
            T(b + "attn_gate.weight", (n_value, hp.n_embd), net + "in_proj_z.weight", heads(0, e.n_embd_v)),
            T(b + "ssm_beta.weight", (e.n_v_head, hp.n_embd), net + "in_proj_b.weight", heads(0)),
            T(b + "ssm_alpha.weight", (e.n_v_head, hp.n_embd), net + "in_proj_a.weight", heads(0)),
            T(b + "ssm_conv1d.weight", (channels, e.n_conv), net + "conv1d.weight", conv, matrix=False),
            T(b + "ssm_a", (e.n_v_head,), net + "A_log", lambda x: _v_heads(-np.exp(x), 0, e.n_k_head, 1, 0)),
            T(b + "ssm_dt.bias", (e.n_v_head,), net + "dt_bias", heads(0), alias=b + "ssm_dt"),
            T(b + "ssm_norm.weight", (e.n_embd_v,), net + "norm.weight"),
            T(b + "ssm_out.weight", (hp.n_embd, n_value), net + "out_proj.weight", heads(1, e.n_embd_v)),
        ]

    @staticmethod
    def _experts(hp, b, hub):
        n_embd, n_shared = hp.n_embd, hp.extra.n_ff_shexp
        shared = hub + "mlp.shared_expert."
        return [
            T(b + "post_attention_norm.weight", (n_embd,), hub + "post_attention_layernorm.weight", _plus_one),
            *blocks.routed_tensors(hp, b, hub),
            T(b + "ffn_gate_inp_shexp.weight", (1, n_embd), hub + "mlp.shared_expert_gate.weight"),
            T(b + "ffn_gate_shexp.weight", (n_shared, n_embd), shared + "gate_proj.weight"),
            T(b + "ffn_up_shexp.weight", (n_shared, n_embd), shared + "up_proj.weight"),
            T(b + "ffn_down_shexp.weight", (n_embd, n_shared), shared + "down_proj.weight"),
        ]

    @classmethod
    def _mtp(cls, hp, b, hub):
        n = (hp.n_embd,)
        table = [
            *cls._attention(hp, b, hub),
            *cls._experts(hp, b, hub),
            T(b + "nextn.eh_proj.weight", (hp.n_embd, 2 * hp.n_embd), "mtp.fc.weight"),
            T(b + "nextn.enorm.weight", n, "mtp.pre_fc_norm_embedding.weight", _plus_one),
            T(b + "nextn.hnorm.weight", n, "mtp.pre_fc_norm_hidden.weight", _plus_one),
            T(b + "nextn.shared_head_norm.weight", n, "mtp.norm.weight", _plus_one),
        ]
        return [T(**{**vars(t), "mtp": True}) for t in table]

    # ---- memory ----

    @classmethod
    def workspace(cls, hp):
        e = hp.extra
        n_q, n_kv = hp.n_head * hp.n_embd_head_k, hp.n_head_kv * hp.n_embd_head_k
        n_value, channels = e.n_v_head * e.n_embd_v, 2 * e.n_k_head * e.n_embd_k + e.n_v_head * e.n_embd_v
        return {
            **blocks.workspace(hp),
            "q_gate": 2 * n_q, "q": n_q, "attn": n_q, "k": n_kv, "v": hp.n_head_kv * hp.n_embd_head_v,
            "qkv": channels, "conv": channels, "z": n_value, "delta": n_value, "alpha": e.n_v_head, "beta": e.n_v_head,
            "shexp_gate": e.n_ff_shexp, "shexp_up": e.n_ff_shexp, "shexp_scale": 1,
        }  # fmt: skip

    @classmethod
    def recurrent_shapes(cls, hp):
        e = hp.extra
        channels = 2 * e.n_k_head * e.n_embd_k + e.n_v_head * e.n_embd_v
        return {"delta": (e.n_v_head, e.n_embd_k, e.n_embd_v), "conv": (e.n_conv - 1, channels)}

    # ---- the description ----

    def mix(self, run, layer):
        run.ops.rms_norm(run.ws.h, run.ws.x, layer.attn_norm, self.hp.norm_rms_eps)
        if layer.kind == "attention":
            self._gated_attention(run, layer)
        else:
            self._gated_delta_net(run, layer)

    def _gated_attention(self, run, layer):
        ops, ws, hp = run.ops, run.ws, self.hp
        ops.matmul(ws.q_gate, layer.attn_q, ws.h)
        ops.matmul(ws.k, layer.attn_k, ws.h)
        ops.matmul(ws.v, layer.attn_v, ws.h)
        # Each head of q_proj holds its query, then its gate.
        query, gate = blocks.halves(ws.q_gate, hp.n_head)  # 2 x [n_tokens, n_head, n_embd_head]
        q, k = blocks.heads(ws.q, hp.n_head), blocks.heads(ws.k, hp.n_head_kv)
        ops.rms_norm(q, query, layer.attn_q_norm, hp.norm_rms_eps)
        ops.rms_norm(k, k, layer.attn_k_norm, hp.norm_rms_eps)
        attn = blocks.attend(run, layer, q, k, blocks.heads(ws.v, hp.n_head_kv))
        ops.gate(attn, attn, gate)
        ops.matmul(ws.out, layer.attn_output, ws.attn)

    def _gated_delta_net(self, run, layer):
        ops, ws, e = run.ops, run.ws, self.hp.extra
        memory = run.state.layers[layer.index]
        ops.matmul(ws.qkv, layer.attn_qkv, ws.h)
        ops.matmul(ws.z, layer.attn_gate, ws.h)
        ops.matmul(ws.alpha, layer.ssm_alpha, ws.h)
        ops.matmul(ws.beta, layer.ssm_beta, ws.h)
        ops.short_conv(ws.conv, ws.qkv, layer.ssm_conv1d, memory.conv)
        ops.delta_rule(
            blocks.heads(ws.delta, e.n_v_head), ws.conv, ws.alpha, ws.beta, layer.ssm_a, layer.ssm_dt_bias, memory.delta
        )
        out = blocks.heads(ws.delta, e.n_v_head)
        ops.rms_norm(out, out, layer.ssm_norm, self.hp.norm_rms_eps)
        ops.swiglu(ws.delta, ws.z, ws.delta)
        ops.matmul(ws.out, layer.ssm_out, ws.delta)

    def ffn(self, run, layer):
        ops, ws = run.ops, run.ws
        ops.rms_norm(ws.h, ws.x, layer.post_attention_norm, self.hp.norm_rms_eps)
        blocks.route(run, layer)
        ops.matmul(ws.shexp_gate, layer.ffn_gate_shexp, ws.h)
        ops.matmul(ws.shexp_up, layer.ffn_up_shexp, ws.h)
        ops.swiglu(ws.shexp_gate, ws.shexp_gate, ws.shexp_up)
        ops.matmul(ws.out, layer.ffn_down_shexp, ws.shexp_gate)
        ops.matmul(ws.shexp_scale, layer.ffn_gate_inp_shexp, ws.h)
        ops.gate(ws.out, ws.out, ws.shexp_scale)
        run.experts.ffn(run, layer)  # adds to out


def _plus_one(x):
    """Zero-centred norm weights of the checkpoint -> ordinary ones."""
    return x + np.float32(1)


def _v_heads(x, axis, n_k_head, width, start):
    """Re-order V heads along `axis`, from grouped by K head (checkpoint) to tiled (GGUF): heads of `width` from `start` on."""
    x = np.moveaxis(x, axis, 0)
    heads = x[start:].reshape(n_k_head, -1, width, *x.shape[1:])
    tiled = np.concatenate([x[:start], heads.swapaxes(0, 1).reshape(-1, *x.shape[1:])])
    return np.ascontiguousarray(np.moveaxis(tiled, 0, axis))
