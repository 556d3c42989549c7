"""Sampler: distributions worked out by hand, frequencies, seeds, bad parameters, and stop strings cut anywhere."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rgpu.errors import RgpuError
from rgpu.sampler import Sampler, SamplingParams, StopStrings

OPEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # no filter at all
PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])  # of ids 0 to 4
LOGITS = (np.log(PROBABILITIES) + 3).astype(np.float32)  # a constant changes nothing


def frequencies(n=20_000, logits=LOGITS, history=(), **params):
    sampler = Sampler(SamplingParams(seed=11, **OPEN | params), len(logits))
    return np.bincount([sampler.sample(logits, history).id for _ in range(n)], minlength=len(logits))


def assert_distributed(counts, expected):
    """Chi-square: for d degrees of freedom mean d, deviation sqrt(2d); 5 deviations are beyond chance. Zero means never."""
    expected = np.asarray(expected, float) / sum(expected)
    assert not counts[expected == 0].any()
    likely, n = expected > 0, counts.sum()
    statistic = ((counts[likely] - n * expected[likely]) ** 2 / (n * expected[likely])).sum()
    degrees = max(1, likely.sum() - 1)
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, PROBABILITIES),
        ({"top_k": 2}, [0, 4, 0, 3, 0]),
        ({"top_k": 99}, PROBABILITIES),
        ({"top_p": 0.69}, [0, 4, 0, 3, 0]),
        ({"top_p": 0.71}, [0, 40, 0, 30, 15]),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.0}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.999}, PROBABILITIES),
        ({"min_p": 0.3}, [0, 40, 0, 30, 15]),  # 0.3 * 0.4 = 0.12
        ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 4, 0, 3, 0]),  # of what top-k leaves: 0.4 / 0.85, 0.7 / 0.85 = 0.82
        ({"top_p": 0.84, "min_p": 0.5}, [0, 4, 0, 3, 0]),
        ({"top_p": 0.6, "min_p": 0.1}, [0, 4, 0, 3, 0]),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"temperature": 2.0}, PROBABILITIES**0.5),
        ({"temperature": 2.0, "top_p": 0.71}, [0, 0.4**0.5, 0, 0.3**0.5, 0.15**0.5]),  # top-p before temperature
        ({"logit_bias": {1: -math.inf}}, [5, 0, 10, 30, 15]),
        ({"logit_bias": {0: math.log(8.0)}}, [40, 40, 10, 30, 15]),
    ],
)
def test_known_distributions(params, expected):
    assert_distributed(frequencies(**params), expected)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"repeat_penalty": 2.0}, [2.0, 1.0, -2.0, 0.0]),
        ({"presence_penalty": 0.5}, [2.0, 1.5, -1.5, -0.5]),
        ({"frequency_penalty": 0.5}, [2.0, 1.0, -1.5, -0.5]),
        ({"frequency_penalty": 0.5, "repeat_last_n": 2}, [2.0, 1.5, -1.5, 0.0]),
        ({"frequency_penalty": 0.5, "repeat_last_n": -1}, [1.5, 1.0, -1.5, -0.5]),
        ({"frequency_penalty": 0.5, "repeat_last_n": 9}, [1.5, 1.0, -1.5, -0.5]),
        ({"repeat_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.5}, [2.0, -0.25, -2.75, -0.75]),
        ({"repeat_penalty": 2.0, "repeat_last_n": 0}, [2.0, 2.0, -1.0, 0.0]),
    ],
)
def test_penalties_by_hand(params, expected):
    """Positive logits are divided, others multiplied, then a token's count and presence taken off, in a window of four."""
    sampler = Sampler(SamplingParams(**{"repeat_last_n": 4} | params), 4)
    logits = np.array([2.0, 2.0, -1.0, 0.0], np.float32)
    sampler.sample(logits, history=[0, 3, 1, 2, 1])
    np.testing.assert_allclose(sampler._logits, expected, rtol=1e-6)
    assert logits.tolist() == [2.0, 2.0, -1.0, 0.0], "the model's own stay as they are"


def test_zero_temperature_takes_the_likeliest_and_of_equals_the_lowest():
    for seed in range(5):
        sampler = Sampler(SamplingParams(temperature=0, seed=seed), 6)
        assert sampler.sample(np.array([1, 3, -2, 3, 3, 0], np.float32)).id == 1
    biased = Sampler(SamplingParams(temperature=-1.0, logit_bias={4: 0.5}), 6)
    assert biased.sample(np.array([1, 3, -2, 3, 3, 0], np.float32)).id == 4


def test_top_k_of_equals_keeps_the_lowest_ids():
    counts = frequencies(n=4000, logits=np.array([0, 1, 1, 1, 1], np.float32), top_k=2)
    assert_distributed(counts, [0, 1, 1, 0, 0])


def test_equal_seeds_give_equal_answers_and_others_differ():
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)

    def answer(seed):
        sampler = Sampler(SamplingParams(seed=seed, **OPEN), 1000)
        return [sampler.sample(logits).id for _ in range(30)]

    assert answer(5) == answer(5) != answer(6)
    assert answer(None) != answer(None)


@pytest.mark.parametrize("params", [{}, {"top_k": 0}, {"top_k": 0, "min_p": 0.0}, {"top_k": 0, "top_p": 1.0}, {"top_k": 1000}])
def test_a_large_vocabulary_is_filtered_as_a_sorted_one(params):
    """Against the plain way: sort everything, then cut where llama.cpp's samplers cut."""
    params = SamplingParams(**params)
    rng = np.random.default_rng(3)
    for spread in (0.5, 3.0):
        logits = (rng.normal(size=50_000) * spread).astype(np.float32)
        order = np.argsort(-logits, kind="stable")[: params.top_k or None]
        probabilities = np.exp(logits[order].astype(np.float64) - logits.max())
        probabilities /= probabilities.sum()
        count = len(order)
        if params.top_p < 1:
            count = int(np.flatnonzero(np.cumsum(probabilities) >= params.top_p)[0]) + 1
        if params.min_p > 0:
            count = min(count, int((probabilities >= params.min_p * probabilities[0]).sum()))
        sampler = Sampler(params, len(logits))
        sampler.sample(logits)
        ids, relative = sampler._kept(int(order[0]))
        assert abs(len(ids) - count) <= 1  # one token at the edge may fall to rounding
        assert set(ids[: count - 1]) <= set(order[:count])
        np.testing.assert_allclose(relative, logits[ids] - logits.max(), rtol=1e-5, atol=1e-5)


def test_logprobs_are_of_the_logits_as_they_came():
    params = SamplingParams(temperature=0, logit_bias={4: 10.0}, logprobs=3)
    id, logprob, top = Sampler(params, 5).sample(LOGITS)
    assert id == 4 and logprob == pytest.approx(math.log(0.15), abs=1e-5)
    assert [id for id, _ in top] == [1, 3, 4]
    assert [value for _, value in top] == pytest.approx(np.log([0.4, 0.3, 0.15]), abs=1e-5)
    alone = Sampler(SamplingParams(temperature=0, logprobs=0), 5).sample(LOGITS)
    assert alone == (1, pytest.approx(math.log(0.4), abs=1e-5), ())
    assert Sampler(SamplingParams(), 5).sample(LOGITS)[1:] == (None, ())


def test_a_forbidden_token_never_comes_however_few_are_left():
    logits = np.full(8, -np.inf, np.float32)
    logits[[2, 5]] = [-1000.0, -1001.0]
    for params in ({}, {"top_k": 6}, {"top_k": 0, "top_p": 0.999999}, {"temperature": 1e-310}, {"temperature": 1e30}):
        sampler = Sampler(SamplingParams(seed=1, **OPEN | params), 8)
        assert {sampler.sample(logits).id for _ in range(200)} <= {2, 5}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_allow_no_choice_are_an_error(value):
    logits = np.full(4, value, np.float32)
    with pytest.raises(RgpuError, match="no token can be chosen"):
        Sampler(SamplingParams(), 4).sample(logits)
    logits[:3] = 1.0
    if not value < 0:
        with pytest.raises(RgpuError, match="no token can be chosen"):
            Sampler(SamplingParams(temperature=0), 4).sample(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("min_p", 2),
        ("repeat_penalty", 0.0),
        ("repeat_last_n", -2),
        ("presence_penalty", math.inf),
        ("frequency_penalty", "x"),
        ("seed", -1),
        ("logprobs", -1),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("stop", ("a", "")),
        ("stop", (3,)),
    ],
)
def test_bad_parameters_are_named(name, value):
    with pytest.raises(RgpuError, match=f"^{name} is "):
        SamplingParams(**{name: value})


def test_parameters_beyond_the_vocabulary_are_named():
    for params in ({"logit_bias": {10: 1.0}}, {"logprobs": 11}):
        with pytest.raises(RgpuError, match=f"^{next(iter(params))} is "):
            Sampler(SamplingParams(**params), 10)


def test_one_stop_string_may_come_without_a_tuple():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b") and SamplingParams(stop=None).stop == ()


# Stop strings.

LETTERS = st.text("ab\n", min_size=1, max_size=5)


@given(st.text("ab\n", max_size=40), st.lists(LETTERS, max_size=3), st.data())
def test_stop_strings_end_the_answer_wherever_it_is_cut(text, stop, data):
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]  # the one that is complete first
    expected = text[: min(found)[1]] if found else text
    stops, out, position = StopStrings(stop), "", 0
    while position < len(text) and not stops.stopped:
        step = data.draw(st.integers(1, len(text) - position))
        piece, stopped = stops.push(text[position : position + step])
        out, position = out + piece, position + step
        assert expected.startswith(out), "a piece of a stop string, or of what follows it, got out"
        assert stopped == stops.stopped
    assert stops.stopped == bool(found)
    assert out + stops.flush() == expected
    assert not found or stops.push("more") == ("", True)


@given(st.text("abc", min_size=1, max_size=30), LETTERS)
def test_nothing_is_held_back_without_need(text, stop):
    assume(stop not in text)
    out, _ = StopStrings([stop]).push(text)
    held = text[len(out) :]
    assert stop.startswith(held) and len(held) < len(stop)


SHORT = [dict(temperature=0), dict(), dict(top_k=5, top_p=1, min_p=0), dict(top_k=64, temperature=2, min_p=0)]
LONG = [dict(repeat_penalty=2), dict(presence_penalty=1), dict(logit_bias={3: 1}), dict(logprobs=0)]
LONG += [dict(top_k=0), dict(top_k=1025)]


@pytest.mark.parametrize("settings", SHORT)
def test_a_shortlist_is_all_that_a_choice_looks_at(settings):
    rng = np.random.default_rng(3)
    params = SamplingParams(seed=1, **settings)
    whole, short = Sampler(params, 500), Sampler(params, 500)
    for _ in range(40):
        logits = np.round(3 * rng.standard_normal(500), 1).astype(np.float32)  # with ties
        ids = np.argsort(-logits, kind="stable")[: short.shortlist]
        assert short.choose(ids, logits[ids]).id == whole.sample(logits).id
    with pytest.raises(RgpuError, match="no token can be chosen"):
        short.choose(ids, np.full(len(ids), np.nan, np.float32))


@pytest.mark.parametrize("settings", LONG)
def test_what_needs_every_logit_has_no_shortlist(settings):
    assert Sampler(SamplingParams(**settings), 5000).shortlist == 0
    assert Sampler(SamplingParams(top_k=40), 40).shortlist == 0
