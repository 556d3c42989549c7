"""The architectures' tables and what they refuse: settings of a checkpoint that would change its answers unseen."""

import numpy as np
import pytest

from rgpu.errors import UnsupportedModel
from rgpu.models import architectures, for_gguf, for_hub
from rgpu.models.qwen35moe import _v_heads
from tests.tiny_hub import hub_config


def config(arch, **changes):
    c = hub_config(arch)
    return {**(c.get("text_config") or c), **changes}


@pytest.mark.parametrize("arch", sorted(architectures()))
@pytest.mark.parametrize(
    "changes, named",
    [
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
    ],
)
def test_settings_that_are_not_computed_are_refused(arch, changes, named):
    model = architectures()[arch]
    model.metadata_from_hub(config(arch))
    with pytest.raises(UnsupportedModel, match=named):
        model.metadata_from_hub(config(arch, **changes))


def test_dense_layers_and_windows_of_qwen3moe_are_refused():
    for changes in ({"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}, {"use_sliding_window": True}):
        with pytest.raises(UnsupportedModel, match=next(iter(changes))):
            architectures()["qwen3moe"].metadata_from_hub(config("qwen3moe", **changes))


def test_unknown_names_list_the_known_ones():
    for look_up, known in ((for_gguf, "qwen35moe"), (for_hub, "qwen3_5_moe")):
        with pytest.raises(UnsupportedModel, match=f"supported: .*{known}"):
            look_up("mystery")


def test_v_heads_go_from_grouped_to_tiled():
    """By hand, 2 K heads of 3 V heads each: heads 0 1 2 | 3 4 5 become 0 3 | 1 4 | 2 5; what lies before `start` stays."""
    x = np.array([-1, -2, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5])
    tiled = [-1, -2, 0, 0.5, 3, 3.5, 1, 1.5, 4, 4.5, 2, 2.5, 5, 5.5]
    np.testing.assert_array_equal(_v_heads(x, 0, 2, 2, 2), tiled)
    np.testing.assert_array_equal(_v_heads(np.stack([x, x]), 1, 2, 2, 2), [tiled, tiled])


@pytest.mark.parametrize("arch", sorted(architectures()))
def test_no_two_tensors_share_a_name(arch):
    model, c = architectures()[arch], config(arch)
    table = model.tensors(model.hparams(model.metadata_from_hub(c), c["vocab_size"]))
    names, hubs = [t.name for t in table], [(t.hub, t.experts) for t in table]
    assert len(set(names)) == len(names) and len(set(hubs)) == len(hubs)
