"""The demo model's shape, its tokenizer and chat template, faster experts for training and 4-bit rounding of weights.
What is learned stands in corpus.py, how in train.py."""
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

VOCAB = 1792
# the pre-tokenizer of the qwen35 family (a data fact of that format)
QWEN35_RE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
             r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["<think>", "</think>"]
TEMPLATE = """{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('The demo model knows the roles system, user and assistant only.') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content | trim) + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def make_tokenizer(texts):
    """Byte-level BPE of VOCAB tokens trained on `texts`, with ChatML's special tokens and the template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN35_RE), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB - len(SPECIAL) - len(PLAIN), show_progress=False,
                                                       initial_alphabet=alphabet))
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=TEMPLATE, model_max_length=2048)


def make_model(tokenizer):
    """A new model of 15.4 M parameters: 3 delta-net layers and 1 attention layer, 16 experts of which 2 run."""
    config = Qwen3_5MoeTextConfig(
        vocab_size=VOCAB, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts=16, num_experts_per_tok=2, moe_intermediate_size=256, shared_expert_intermediate_size=256,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25, mrope_section=[3, 3, 2],
                             mrope_interleaved=True),
        max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    model = Qwen3_5MoeForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):
                weight.uniform_(0.02, 2).log_()          # slow decay: these conversations are short
    return model


def experts_forward(self, hidden, top_k_index, top_k_weights):
    """Same result as the eager experts; tokens sorted by expert once, one matmul pair each. hidden [n_tokens, n_embd]."""
    n_tokens, k = top_k_index.shape
    flat = top_k_index.reshape(-1)
    order = flat.argsort()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    counts = torch.bincount(flat, minlength=self.num_experts).tolist()
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    gate_up, down = self.gate_up_proj.to(dtype).unbind(0), self.down_proj.to(dtype).unbind(0)
    out = []
    for expert, x in enumerate(hidden.to(dtype)[order // k].split(counts)):
        if len(x):
            gate, up = F.linear(x, gate_up[expert]).chunk(2, dim=-1)
            out.append(F.linear(F.silu(gate) * up, down[expert]))
    out = torch.cat(out)[inverse].view(n_tokens, k, -1)
    return (out * top_k_weights[..., None]).sum(1).to(hidden.dtype)


def use_fast_training():
    """Replaces the experts' forward and takes chunks of 16 or 32 positions in the delta rule (rows here are short)."""
    modeling.Qwen3_5MoeExperts.forward = experts_forward
    chunked = modeling.torch_chunk_gated_delta_rule

    def short_chunks(query, *args, **kwargs):
        return chunked(query, *args, **{**kwargs, "chunk_size": 16 if query.shape[1] % 32 else 32})

    modeling.torch_chunk_gated_delta_rule = short_chunks


def is_quantised(name, weight):
    """Whether the converter would store this tensor in 4 bits."""
    return weight.ndim >= 2 and weight.shape[-2] >= 32 and "conv1d" not in name and not name.endswith("mlp.gate.weight")


def round_4bit(weight):
    """`weight` rounded to 16 levels per 32 values of a row, with the lowest level at or below zero (as Q4_K has it)."""
    blocks = weight.reshape(-1, 32)
    low = blocks.amin(1, keepdim=True).clamp_(max=0)
    step = ((blocks.amax(1, keepdim=True) - low) / 15).clamp_(min=1e-8)
    return ((blocks - low) / step).round_().clamp_(0, 15).mul_(step).add_(low).reshape(weight.shape)
