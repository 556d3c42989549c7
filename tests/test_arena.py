"""The slot arena: properties that hold under any routing and any order of calls, and small cases worked out by hand."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rgpu.errors import OutOfMemory
from rgpu.residency.arena import SlotArena, Swap
from rgpu.residency.policy import LRU, POLICIES, Static

N_EXPERT, CLASS_OF, K = 8, [0, 1, 0, 1, 1], 2  # five layers in two size classes
N_LAYER = len(CLASS_OF)
N_KEYS = N_LAYER * N_EXPERT
experts_of_a_step = st.lists(
    st.lists(st.integers(0, N_EXPERT - 1), min_size=K, max_size=K, unique=True), min_size=N_LAYER, max_size=N_LAYER
)


def layer_of(key: int) -> int:
    return key // N_EXPERT


class AnyUse(RuleBasedStateMachine):
    """An arena under any sequence of steps, prefills, fills and losses of memory."""

    @initialize(
        name=st.sampled_from(list(POLICIES)), floor=st.integers(0, 3), spare=st.integers(0, 4),
        room=st.tuples(*2 * [st.integers(0, 8)]), window=st.integers(1, 40), limit=st.integers(0, 6),
    )  # fmt: skip
    def begin(self, name, floor, spare, room, window, limit):
        least = [CLASS_OF.count(cls) * floor + spare for cls in range(2)]
        slots = [max(n + more, 1) for n, more in zip(least, room, strict=True)]
        self.arena, self.policy = SlotArena(N_LAYER, N_EXPERT, CLASS_OF, slots, floor, spare), POLICIES[name](N_LAYER, N_EXPERT)
        self.policy.restore(np.random.default_rng(0).random(N_KEYS, np.float32))
        self.arena.window, self.arena.limit = window, limit
        self.step, self.n_slots, self.gone = 0, slots, [0, 0]
        self.reached = [False] * N_LAYER  # layers that have had their floor
        self.decode_set: list[tuple[int, int]] | None = None  # what was resident before slots were lent

    def residents(self) -> list[tuple[int, int]]:
        return [(int(key), slot) for slot, key in enumerate(self.arena.key_in) if key >= 0]

    def class_of_slot(self, slot: int) -> int:
        return int(slot >= self.n_slots[0])

    # ---- what may happen ----

    @precondition(lambda self: self.decode_set is None)
    @rule(experts=experts_of_a_step, lands=st.booleans(), makes_room=st.booleans(), fails=st.booleans())
    def decode(self, experts, lands, makes_room, fails):
        arena = self.arena
        lands &= arena.spare >= K  # a layer's misses land together
        before = arena.table.copy()
        used = np.array([layer * N_EXPERT + e for layer, chosen in enumerate(experts) for e in chosen])
        missed = [key for key in used.tolist() if arena.slot_of[key] < 0]
        for layer in range(N_LAYER) if lands else ():
            mine = [key for key in missed if layer_of(key) == layer]
            if makes_room:
                arena.make_room(layer, len(mine), self.policy)
                assert len(arena.landing) + len(mine) <= sum(len(pool.free) for pool in arena.pools)
            slots = [arena.land(key) for key in mine]
            assert len(set(slots)) == len(mine) and [arena.landed(key) for key in mine] == slots
            assert (arena.key_in[slots] == -1).all()
            if fails and mine:
                arena.forget(mine[0])
                assert arena.landed(mine[0]) == -1
        assert (arena.table == before).all()  # residency is constant within a step
        landed = dict(arena.landing)
        self.step += 1
        self.policy.touch(self.step, used)
        swaps = arena.turn(used, self.policy, None if lands else np.array(missed, np.int64))
        self.check(swaps, used, before, landed if lands else dict.fromkeys(missed), lands)

    def check(self, swaps, used, before, candidates, lands):
        """One turn: who came, who left, who could not."""
        arena, was = self.arena, before.reshape(-1)
        stayed = [key for key in used if was[key] >= 0]
        assert (arena.slot_of[stayed] == was[stayed]).all()  # never a key that the step used
        expected = was.copy()
        for key, slot, evicted in swaps:
            assert key in candidates and (not lands or slot == candidates[key])
            if evicted >= 0:
                assert expected[evicted] >= 0
                expected[evicted] = -1
        for key, slot, _ in swaps:
            expected[key] = slot
        assert (arena.slot_of == expected).all()  # nothing changed but what was reported
        replaced = Counter(CLASS_OF[layer_of(swap.key)] for swap in swaps if swap.evicted >= 0)
        if not lands:
            assert all(n <= arena.limit for n in replaced.values())
        assert not arena.landing and not arena.lander
        for swap in swaps:
            if swap.evicted >= 0:
                assert self.policy.score(np.array([swap.key])) > self.policy.score(np.array([swap.evicted]))

    @precondition(lambda self: self.decode_set is None)
    @rule(order=st.permutations(range(N_KEYS)), n=st.integers(0, N_KEYS))
    def fill(self, order, n):
        before = self.residents()
        filled = self.arena.fill(order[:n])
        assert sorted(self.residents()) == sorted(before + filled)

    @precondition(lambda self: self.decode_set is None)
    @rule(layer=st.integers(0, N_LAYER - 1), expert=st.integers(0, N_EXPERT - 1))
    def prefill_keeps(self, layer, expert):
        """A prompt's expert becomes resident where it landed, if there is room."""
        arena, key, before = self.arena, layer * N_EXPERT + expert, self.residents()
        if arena.slot_of[key] >= 0 or not arena.pools[CLASS_OF[layer]].free:
            return
        slot = arena.land(key)
        kept = arena.settle(key)
        assert sorted(self.residents()) == sorted(before + [(key, slot)] * kept)
        arena.forget_all()

    @rule(data=st.data(), cls=st.integers(0, 1))
    def lend(self, data, cls):
        arena = self.arena
        pool = arena.pools[cls]
        before = self.decode_set or self.residents()
        n = data.draw(st.integers(0, len(pool.slots) - arena.spare - len(pool.lent)))
        lent = arena.lend(n, cls)
        assert len(set(lent)) == n and {self.class_of_slot(slot) for slot in lent} <= {cls}
        assert (arena.key_in[lent] == -1).all()
        self.decode_set = before

    @precondition(lambda self: self.decode_set is not None)
    @rule()
    def restore(self):
        missing = set(self.decode_set) - set(self.residents())
        assert set(self.arena.restore()) == missing
        assert self.residents() == self.decode_set
        self.decode_set = None

    @precondition(lambda self: self.decode_set is None)
    @rule(n=st.integers(0, 6), cls=st.integers(0, 1))
    def shrink(self, n, cls):
        arena, before = self.arena, self.residents()
        pool = arena.pools[cls]
        free = len(pool.free)
        if len(pool.slots) - n < CLASS_OF.count(cls) * arena.floor + arena.spare:
            with pytest.raises(OutOfMemory):
                arena.shrink(n, cls, self.policy)
            assert self.residents() == before
            return
        owed = pool.owed
        gone = arena.shrink(n, cls, self.policy)
        assert len(set(gone)) == n and {self.class_of_slot(slot) for slot in gone} <= {cls}
        assert len(before) - len(self.residents()) == max(n - (free - arena.spare - owed), 0)  # the empty ones first
        self.gone[cls] += n

    # ---- what always holds ----

    @invariant()
    def tables_agree_and_classes_are_never_mixed(self):
        arena = self.arena
        for key, slot in self.residents():
            assert arena.slot_of[key] == slot and self.class_of_slot(slot) == CLASS_OF[layer_of(key)]
        assert (arena.slot_of >= 0).sum() == len(self.residents())
        assert arena.held.tolist() == (arena.table >= 0).sum(axis=1).tolist()

    @invariant()
    def every_slot_is_resident_or_free_or_lent(self):
        for cls, pool in enumerate(self.arena.pools):
            residents = [slot for _, slot in self.residents() if self.class_of_slot(slot) == cls]
            lent = [slot for _, slot in pool.lent]
            assert sorted([*residents, *pool.free, *lent]) == pool.slots.tolist()
            assert len(pool.slots) + self.gone[cls] == self.n_slots[cls]
            assert len(pool.free) >= self.arena.spare

    @invariant()
    def floors_are_kept_and_can_be_reached(self):
        arena = self.arena
        if self.decode_set is not None:
            return
        for layer, held in enumerate(arena.held):
            assert held >= arena.floor or not self.reached[layer]
            self.reached[layer] |= bool(held >= arena.floor)
        for cls, pool in enumerate(arena.pools):
            lacking = [max(arena.floor - int(held), 0) for layer, held in enumerate(arena.held) if CLASS_OF[layer] == cls]
            assert pool.owed == sum(lacking) <= len(pool.free) - arena.spare


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(max_examples=250, stateful_step_count=30)


# ---- by hand ----


def arena_with(*keys: int, slots: int, spare: int = 0, n_expert: int = 8, n_layer: int = 1, floor: int = 0) -> SlotArena:
    arena = SlotArena(n_layer, n_expert, [0] * n_layer, [slots], floor, spare)
    assert [key for key, _ in arena.fill(keys)] == list(keys)
    return arena


def scores(values: list[float]) -> Static:
    policy = Static(1, len(values))
    policy.restore(np.array(values, np.float32))
    return policy


def test_the_best_newcomers_take_the_places_of_the_least():
    arena = arena_with(0, 1, 2, 3, slots=4)
    policy = scores([5, 1, 3, 9, 4, 2, 6, 8])
    # 7 (8) for 1 (1), 6 (6) for 2 (3); 4 (4) is worth less than 0 (5), and 5 is not the best either.
    assert arena.turn(np.array([3]), policy, np.array([4, 5, 6, 7])) == [Swap(7, 1, 1), Swap(6, 2, 2)]
    assert arena.table.tolist() == [[0, -1, -1, 3, -1, -1, 2, 1]]
    assert arena.key_in.tolist() == [0, 7, 6, 3]


def test_what_was_used_stays_whatever_it_is_worth():
    arena = arena_with(0, 1, slots=2)
    assert arena.turn(np.array([0, 1, 7]), scores([0, 0, 0, 0, 0, 0, 0, 9]), np.array([7])) == []
    assert arena.turn(np.array([1, 7]), scores([0, 0, 0, 0, 0, 0, 0, 9]), np.array([7])) == [Swap(7, 0, 0)]


def test_an_equal_does_not_replace_an_equal():
    assert arena_with(0, slots=1).turn(np.array([4]), scores([3, 0, 0, 0, 3, 0, 0, 0]), np.array([4])) == []


def test_the_limit_and_the_share_of_the_policy():
    values = [0, 0, 0, 0, 4, 5, 6, 7]
    newcomers = np.array([4, 5, 6, 7])
    arena = arena_with(0, 1, 2, 3, slots=4)
    arena.limit = 3
    assert [swap.key for swap in arena.turn(np.array([0]), scores(values), newcomers)] == [7, 6, 5]
    policy = scores(values)
    policy.share = 0.3  # of four: 1.2, and so 2
    assert [swap.key for swap in arena_with(0, 1, 2, 3, slots=4).turn(np.array([0]), policy, newcomers)] == [7, 6]


def test_the_hand_goes_on_from_where_it_was():
    arena = arena_with(0, 1, 2, 3, slots=4)
    arena.window = 2
    policy = scores([1, 2, 0, 0, 9, 9, 9, 9])
    none = np.array([], np.int64)
    assert arena.turn(none, policy, np.array([4])) == [Swap(4, 0, 0)]  # it passes slots 0 and 1, not the least of all
    assert arena.turn(none, policy, np.array([5, 6, 7])) == [Swap(5, 2, 2), Swap(6, 3, 3)]


def test_what_landed_stays_where_it_is_and_costs_no_limit():
    arena = arena_with(0, 1, slots=4, spare=2)
    arena.limit = 0
    assert [arena.land(4), arena.land(5), arena.land(4)] == [2, 3, 2]
    assert arena.turn(np.array([4, 5]), scores([1, 2, 0, 0, 9, 8, 0, 0]), None) == [Swap(4, 2, 0), Swap(5, 3, 1)]
    assert arena.table.tolist() == [[-1, -1, -1, -1, 2, 3, -1, -1]]
    assert [arena.land(6), arena.land(7)] == [0, 1]  # where the evicted ones were


def test_the_oldest_landing_makes_place_unless_the_least_was_told_to():
    values = scores([0, 0, 0, 0, 9, 3, 5, 1])
    arena = arena_with(0, slots=3, spare=2)
    assert [arena.land(key) for key in (4, 5, 6)] == [1, 2, 1] and arena.landed(4) == -1
    arena = arena_with(0, slots=3, spare=2)
    assert [arena.land(key) for key in (4, 5)] == [1, 2]
    arena.make_room(0, 1, values)
    assert (arena.land(6), arena.landed(4), arena.landed(5)) == (2, 1, -1)
    arena.make_room(0, 1, values)
    assert (arena.land(7), arena.landed(6)) == (2, -1)


def test_room_is_kept_for_layers_below_their_floor():
    """Two layers of four experts, six slots, a floor of two: the first layer gets four, whatever comes."""
    arena = SlotArena(2, 4, [0, 0], [5], 2, 0)
    assert [key for key, _ in arena.fill([0, 1, 2, 3, 4, 5])] == [0, 1, 2, 4, 5]


def test_a_layer_at_its_floor_changes_within_itself():
    arena = arena_with(0, 1, 4, 5, slots=4, n_expert=4, n_layer=2, floor=2)
    policy = Static(2, 4)
    policy.restore(np.array([1, 2, 8, 9, 3, 4, 7, 0], np.float32))
    # 3 (9) for 0 (1), 2 (8) for 1 (2), and 6 (7) for 4 (3), though 0 and 1 are worth less than 4.
    swaps = arena.turn(np.array([], np.int64), policy, np.array([2, 3, 6, 7]))
    assert swaps == [Swap(3, 0, 0), Swap(2, 1, 1), Swap(6, 2, 4)]
    assert arena.held.tolist() == [2, 2]


def test_where_no_floor_is_near_both_ways_to_pair_agree():
    random = np.random.default_rng(1)
    values = random.permutation(64).astype(np.float32)
    policy = Static(4, 16)
    policy.restore(values)
    arena = arena_with(*range(0, 64, 2), slots=32, n_expert=16, n_layer=4)
    newcomers = np.arange(1, 64, 2)
    newcomers = newcomers[np.argsort(-values[newcomers])]
    residents = arena.key_in.astype(np.int64)
    slow = arena._pairs_at_floors(zip(newcomers.tolist(), values[newcomers].tolist(), strict=True), residents, values[residents])
    swaps = arena.turn(np.array([], np.int64), policy, newcomers)
    assert [[swap.key, swap.evicted] for swap in swaps] == slow.T.tolist() and len(swaps) > 5


def test_lending_takes_empty_slots_first_and_restores_the_decode_set():
    arena = arena_with(0, 1, 2, slots=6, spare=1)
    before = arena.table.copy()
    assert arena.lend(4) == [3, 4, 0, 1]  # slot 5 is spare
    assert arena.table.tolist() == [[-1, -1, 2, -1, -1, -1, -1, -1]]
    assert arena.land(7) == 5
    arena.forget_all()
    assert arena.restore() == [(0, 0), (1, 1)]
    assert (arena.table == before).all()


def test_shrinking_gives_up_empty_slots_then_those_worth_least():
    arena = arena_with(0, 1, 2, 3, slots=6, spare=1)
    policy = scores([5, 1, 3, 9, 0, 0, 0, 0])
    assert arena.shrink(1, 0, policy) == [4]
    assert arena.shrink(2, 0, policy) == [5, 1]  # keys 1 and 2 leave; one of three empty slots stays spare
    assert arena.table.tolist() == [[0, -1, -1, 3, -1, -1, -1, -1]]
    assert arena.shrink(0, 0, policy) == []
    with pytest.raises(OutOfMemory, match="0 expert slots for 1 layers: 0 per layer and 1 spare"):
        arena.shrink(3, 0, policy)


def test_too_few_slots():
    with pytest.raises(OutOfMemory, match="23 expert slots for 2 layers: 10 per layer and 4 spare ones are needed"):
        SlotArena(3, 64, [0, 1, 0], [23, 14], floor=10, spare=4)
    SlotArena(3, 64, [0, 1, 0], [24, 14], floor=10, spare=4)


def test_lru_over_some_steps():
    """Three slots, two experts per step; LRU keeps the last three used, of equals the one that came in first."""
    arena, policy = SlotArena(1, 8, [0], [3], 0, 0), LRU(1, 8)
    residents = []
    for step, keys in enumerate([[0, 1], [2, 3], [1, 2], [4, 2]], 1):
        used = np.array(keys)
        policy.touch(step, used)
        arena.turn(used, policy, used[arena.slot_of[used] < 0])
        residents.append(sorted(arena.key_in[arena.key_in >= 0].tolist()))
    # Step 2: 2 takes the empty slot, 3 the place of 0. Step 3: 1 and 2 are hits. Step 4: 4 takes the place of 3.
    assert residents == [[0, 1], [1, 2, 3], [1, 2, 3], [1, 2, 4]]
