"""Policies on traces short enough for a pencil."""

from itertools import product

import numpy as np
import pytest
from pytest import approx

from rgpu.residency.policy import POLICIES, Rotary

N_LAYER, N_EXPERT = 2, 4
ALL = np.arange(N_LAYER * N_EXPERT)
KEEP, NEAR = 0.965, 0.7  # of rotary


def told(name: str, *steps: list[int]):
    """A policy after these steps, 1, 2, …"""
    policy = POLICIES[name](N_LAYER, N_EXPERT)
    for step, keys in enumerate(steps, 1):
        policy.touch(step, np.array(keys))
    return policy


def test_rotary_is_the_default():
    assert next(iter(POLICIES)) == "rotary"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("lru", [3, 1, 2, 0, 0, 1, 0, 0]),
        # uses / (steps since the last + 1)
        ("lfru", [2 / 1, 1 / 3, 1 / 2, 0, 0, 1 / 3, 0, 0]),
        ("static", [0] * 8),
        # Nothing surprises yet: what is usual has not been seen often enough.
        ("rotary", [KEEP**2 + 1, KEEP**2, KEEP, 0, 0, KEEP**2, 0, 0]),
    ],
)
def test_scores(name, expected):
    assert told(name, [0, 1, 5], [2], [0]).score(ALL) == approx(np.array(expected))


@pytest.mark.parametrize("name", POLICIES)
def test_scores_are_of_the_keys_that_were_asked_for(name):
    policy = POLICIES[name](N_LAYER, N_EXPERT)
    policy.restore(np.arange(8, dtype=np.float32))
    policy.touch(1, np.array([0, 6]))
    some = np.array([6, 0, 1])
    assert policy.score(some).dtype == np.float64
    assert policy.score(some).tolist() == policy.score(ALL)[some].tolist()


@pytest.mark.parametrize("learned, used", list(product(POLICIES, POLICIES)))
def test_a_profile_keeps_the_order_for_any_policy(learned, used):
    before = told(learned, [0, 1, 2, 6], [0, 1, 6], [0, 6], [6])
    if learned == "static":
        before.restore(np.array([3, 2, 1, 0, 0, 0, 4, 0], np.float32))
    state = before.state()
    assert state.dtype == np.float32 and state.shape == (8,)
    after = POLICIES[used](N_LAYER, N_EXPERT)
    after.restore(state)
    assert np.argsort(-after.score(ALL), kind="stable").tolist() == np.argsort(-state, kind="stable").tolist()


@pytest.mark.parametrize("name", set(POLICIES) - {"static"})
def test_a_use_is_worth_more_than_a_weak_profile(name):
    policy = POLICIES[name](N_LAYER, N_EXPERT)
    policy.restore(np.array([0.5, 0.25] + 6 * [0.0], np.float32))
    policy.touch(1, np.array([7]))
    assert policy.score(ALL).argmax() == 7


def test_for_lru_any_step_is_later_than_a_profile():
    policy = POLICIES["lru"](N_LAYER, N_EXPERT)
    policy.restore(np.arange(1000, 1008, dtype=np.float32))
    policy.touch(1, np.array([2]))
    assert np.argsort(policy.score(ALL)).tolist() == [0, 1, 3, 4, 5, 6, 7, 2]


def test_static_learns_nothing():
    policy = told("static")
    policy.restore(np.arange(8, dtype=np.float32))
    for step in range(1, 50):
        policy.touch(step, np.array([0, 4]))
    assert policy.score(ALL).tolist() == list(range(8))


# ---- rotary ----


def test_near_misses_count_as_parts_of_uses():
    rotary = Rotary(N_LAYER, N_EXPERT)
    rotary.touch(1, np.array([0]), near=np.array([1, 4]))
    rotary.touch(2, np.array([1]), near=np.array([4]))
    assert rotary.score(ALL) == approx(np.array([KEEP, NEAR * KEEP + 1, 0, 0, NEAR * KEEP + NEAR, 0, 0, 0]))


def test_a_new_topic_fades_the_old_one_faster_and_lifts_the_limit():
    rotary = Rotary(N_LAYER, N_EXPERT)
    old, new = np.array([0, 1]), np.array([2, 3])
    for step in range(1, 401):
        rotary.touch(step, old)
    settled = (1 - KEEP**400) / (1 - KEEP)  # a geometric series
    assert rotary.score(old) == approx(np.full(2, settled)) and rotary.share == 0.5
    # Nothing of what is remembered is used: the greatest surprise, 2, and 2⁴ steps in one.
    rotary.touch(401, new)
    assert rotary.score(ALL)[:4] == approx(np.array([settled * KEEP**16] * 2 + [1.0] * 2)) and rotary.share == 1
    step = 401
    while rotary.score(new).min() <= rotary.score(old).max():
        step += 1
        rotary.touch(step, new)
    assert step <= 405  # without surprise 420: settled · KEEPⁿ < (1 - KEEPⁿ) / (1 - KEEP)
    for later in range(step + 1, step + 100):
        rotary.touch(later, new)
    assert rotary.share == 0.5


def test_sums_stay_finite():
    """The unit passes 1e100 after 6,463 steps; then all begins anew in a smaller one."""
    rotary = Rotary(N_LAYER, N_EXPERT)
    for step in range(1, 7001):
        rotary.touch(step, np.array([0, 1]), near=np.array([4]))
    assert rotary.unit < 1e100
    settled = 1 / (1 - KEEP)
    assert rotary.score(ALL) == approx(np.array([settled, settled, 0, 0, NEAR * settled, 0, 0, 0]))
