"""Writes transformers-*.npz: what transformers (CPU, float32) computes for the tiny checkpoints of tests/tiny_hub.py.

    pip install torch==2.13.0 transformers==5.23.0   # torch by its exact version: a plain `torch` brings CUDA along
    python -m tests.vectors.make_vectors             # from the repository root, a minute

Arrays, for each prompt length n of LENGTHS: `p{n}_ids`; `p{n}_rows`, `p{n}_logits`: positions and their logits; `p{n}_greedy`:
32 greedy tokens; `p{n}_top_ids`, `p{n}_top_logits`: the 8 best after each of these; `p5_steps`: all logits after each.
Of one prompt of 70 tokens (`layers_ids`), per layer i: `layer{i}_mix_in`, `layer{i}_mix`: the mixer's normed input and its
output; `layer{i}_ffn_in`, `layer{i}_ffn`: the same of the feed-forward block; `layer{i}_out`: the residual stream after it.
`weights_sha256`: digest of the checkpoint. Prompts are redrawn until no greedy step and no router choice is a near-tie, so
that a float32 engine must choose alike.
"""

import os
import tempfile
from pathlib import Path

import numpy as np

from tests.tiny import VOCAB, digest
from tests.tiny_hub import hub_checkpoint, hub_config, hub_tensors

os.environ["HF_HUB_OFFLINE"] = "1"
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

ARCHITECTURES = ("qwen35moe", "qwen3moe")
LENGTHS = (1, 2, 3, 4, 5, 63, 64, 65, 150)  # start-up of the convolution, edges of a chunk of 64, several chunks
N_STEPS, N_TOP = 32, 8
N_LAYER_PROMPT = 70
SHORT = 65  # longer prompts keep some rows only
KEPT_ROWS = (0, 1, 2, 3, 31, 32, 62, 63, 64, 65, 66, 126, 127, 128, 129)
# An engine may be off by 1e-3 per logit, so the best two must be further apart than twice that.
LOGIT_GAP = 4e-3
# Router logits of float32 implementations differ by about 1e-5.
ROUTER_GAP = 3e-4


def load(folder):
    """The checkpoint in transformers' plainest form; refuses if one tensor is missing or unknown."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


class Trace:
    """Records inputs and outputs of each layer's mixer and feed-forward block, and the router's margin, of the last call."""

    def __init__(self, model):
        self.arrays, self.router_gap = {}, np.inf
        for i, layer in enumerate(model.model.layers):
            mixer = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
            mixer.register_forward_hook(self.record(f"layer{i}_mix"), with_kwargs=True)
            layer.mlp.register_forward_hook(self.record(f"layer{i}_ffn"), with_kwargs=True)
            layer.register_forward_hook(self.record(f"layer{i}_out"), with_kwargs=True)
            layer.mlp.gate.register_forward_hook(self.margin(layer.mlp.gate, model.config.num_experts_per_tok))

    def record(self, name):
        def hook(module, args, kwargs, output):
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            if not name.endswith("_out"):
                self.arrays[name + "_in"] = x[0].numpy().copy()
            self.arrays[name] = y[0].numpy().copy()

        return hook

    def margin(self, gate, k):
        def hook(module, args, output):
            logits = torch.nn.functional.linear(args[0].reshape(-1, args[0].shape[-1]), gate.weight)
            best = logits.sort(dim=-1, descending=True).values
            self.router_gap = min(self.router_gap, float((best[:, k - 1] - best[:, k]).min()))

        return hook


def logits_of(model, ids, cache=None):
    """(logits [n, VOCAB], cache) of ids that follow what `cache` holds."""
    out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return out.logits[0].numpy(), out.past_key_values


def follow(model, trace, ids):
    """Logits of the prompt, of N_STEPS greedy steps and the tokens chosen; None where a choice is a near-tie."""
    trace.router_gap = np.inf
    prompt, cache = logits_of(model, ids)
    row, steps, greedy = prompt[-1], [], []
    for _ in range(N_STEPS):
        second, best = np.sort(row)[-2:]
        if best - second < LOGIT_GAP:
            return None
        greedy.append(int(row.argmax()))
        row, cache = logits_of(model, greedy[-1:], cache)
        row = row[0]
        steps.append(row)
    whole = logits_of(model, ids + greedy)[0][len(ids) :]  # another route to the same numbers: no cache, one batch
    difference = np.abs(whole - steps).max()
    assert difference < 5e-4, difference
    return None if trace.router_gap < ROUTER_GAP else (prompt, np.array(steps), np.array(greedy, np.int32), difference)


def vectors(arch):
    """All arrays of one architecture."""
    config = hub_config(arch)
    with tempfile.TemporaryDirectory() as folder:
        model = load(hub_checkpoint(folder, arch))
    trace, out = Trace(model), {"weights_sha256": np.array(digest(hub_tensors(config)))}
    for n in LENGTHS:
        for attempt in range(1000):
            ids = np.random.default_rng([n, attempt]).integers(0, VOCAB, n)
            found = follow(model, trace, ids.tolist())
            if found:
                break
        prompt, steps, greedy, difference = found
        rows = np.array([i for i in range(n) if n <= SHORT or i in KEPT_ROWS or i >= n - 20], np.int32)
        top = np.argsort(-steps, axis=1)[:, :N_TOP].astype(np.int32)
        out |= {f"p{n}_ids": ids.astype(np.int32), f"p{n}_rows": rows, f"p{n}_logits": prompt[rows], f"p{n}_greedy": greedy}
        out |= {f"p{n}_top_ids": top, f"p{n}_top_logits": np.take_along_axis(steps, top, axis=1)}
        out |= {f"p{n}_steps": steps} if n == 5 else {}
        print(f"{arch} {n}: attempt {attempt}, logits' deviation {prompt.std():.2f}, transformers from itself {difference:.1e}")
    ids = np.random.default_rng(N_LAYER_PROMPT).integers(0, VOCAB, N_LAYER_PROMPT)
    trace.router_gap = np.inf
    logits_of(model, ids.tolist())
    assert trace.router_gap > ROUTER_GAP / 10, trace.router_gap
    return out | {"layers_ids": ids.astype(np.int32)} | trace.arrays


if __name__ == "__main__":
    with torch.no_grad():
        for arch in ARCHITECTURES:
            path = Path(__file__).with_name(f"transformers-{arch}.npz")
            np.savez_compressed(path, **vectors(arch))
            print(path.name, path.stat().st_size, "bytes")
