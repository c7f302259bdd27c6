import pytest
from helpers_scheduling import BLOCK, sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from ksana_lab.core.block_manager import BlockManager
from ksana_lab.core.block_pool import BlockPool
from ksana_lab.core.prefix_cache import PrefixCache, block_hash


def manager(num_blocks=16, caching=True):
    return BlockManager(num_blocks, BLOCK, enable_prefix_caching=caching)


def computed(blocks, seq, num_tokens=None):
    """Allocate and pretend that everything was computed."""
    assert blocks.allocate(seq, seq.num_tokens)
    seq.num_computed_tokens = num_tokens or seq.num_tokens
    blocks.commit(seq)
    return seq


def test_pool_gives_free_blocks_before_it_evicts():
    pool = BlockPool(3)
    kept = pool.take()
    pool.release(kept, keep=True)
    assert pool.num_free == 3
    assert kept not in {pool.take(), pool.take()}
    assert pool.take() == kept


def test_pool_evicts_the_least_recently_released_first():
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    pool.release(second, keep=True)
    pool.release(first, keep=True)
    assert [pool.take(), pool.take()] == [second, first]


def test_shared_block_is_free_after_its_last_owner():
    pool = BlockPool(1)
    block = pool.take()
    pool.share(block)
    pool.release(block, keep=False)
    assert pool.num_free == 0
    pool.release(block, keep=False)
    assert pool.num_free == 1


def test_releasing_a_free_block_is_caught():
    pool = BlockPool(1)
    block = pool.take()
    pool.release(block, keep=False)
    with pytest.raises(AssertionError):
        pool.release(block, keep=False)


def test_hash_depends_on_parent_and_on_token_boundaries():
    root = block_hash(None, [1, 2])
    assert block_hash(root, [3, 4]) != block_hash(None, [3, 4])
    assert block_hash(None, [1, 23]) != block_hash(None, [12, 3])
    assert len(root) == 16 and root == block_hash(None, [1, 2])


def test_cache_finds_the_longest_leading_run():
    cache = PrefixCache()
    cache.insert(b"a", 1)
    cache.insert(b"c", 3)
    assert cache.find([b"a", b"b", b"c"]) == [1]
    cache.forget(1)
    assert cache.find([b"a"]) == [] and 1 not in cache


def test_second_sequence_shares_the_full_blocks_of_a_common_prefix():
    blocks = manager()
    first = computed(blocks, sequence(0, list(range(10))))
    second = sequence(1, list(range(9)) + [40, 41])
    assert blocks.allocate(second, 11)
    assert second.block_table[:2] == first.block_table[:2] and second.block_table[2] != first.block_table[2]
    assert second.num_computed_tokens == 8


def test_a_full_hit_leaves_one_token_to_compute():
    blocks = manager()
    computed(blocks, sequence(0, list(range(8))))
    twin = sequence(1, list(range(8)))
    assert blocks.allocate(twin, 8)
    assert twin.num_computed_tokens == 4  # the last block is computed again, for the logits of its last token


def test_prefix_outlives_its_sequence_until_the_space_is_needed():
    blocks = manager(4)
    blocks.free(computed(blocks, sequence(0, list(range(9)))))
    assert blocks.num_free == 4
    again = sequence(1, list(range(9)))
    assert blocks.allocate(again, 9) and again.num_computed_tokens == 8
    blocks.free(again)
    blocks.free(computed(blocks, sequence(2, 16)))  # takes all four blocks
    late = sequence(3, list(range(9)))
    assert blocks.allocate(late, 9) and late.num_computed_tokens == 0


def test_the_end_of_a_cached_prefix_is_evicted_before_its_beginning():
    blocks = manager(4)
    blocks.free(computed(blocks, sequence(0, list(range(16)))))
    computed(blocks, sequence(1, 5))  # needs two of the four
    late = sequence(2, list(range(8)) + [1])
    blocks.allocate(late, 4)
    assert late.num_computed_tokens == 8


def test_blocks_that_were_never_computed_are_not_found():
    blocks = manager()
    computed(blocks, sequence(0, list(range(12))), num_tokens=5)
    late = sequence(1, list(range(12)))
    assert blocks.allocate(late, 12) and late.num_computed_tokens == 4


def test_allocation_fails_without_side_effects_when_reserve_would_be_touched():
    blocks = manager(4)
    seq = sequence(0, 12)
    assert not blocks.allocate(seq, 12, reserve=2)
    assert not seq.block_table and blocks.num_free == 4
    assert blocks.allocate(seq, 12, reserve=1)


def test_idle_cached_blocks_are_not_counted_twice():
    blocks = manager(3)
    blocks.free(computed(blocks, sequence(0, list(range(8)))))
    seq = sequence(1, list(range(8)) + [1] * 8)  # two hits, two new; only three blocks exist
    assert not blocks.allocate(seq, 16)
    assert blocks.check([]) == 0


def test_grow_appends_only_what_is_missing():
    blocks = manager(2)
    seq = sequence(0, 3)
    blocks.allocate(seq, 3)
    assert blocks.grow(seq, 4) and len(seq.block_table) == 1
    assert blocks.grow(seq, 5) and len(seq.block_table) == 2
    assert not blocks.grow(seq, 9) and len(seq.block_table) == 2


def test_check_counts_blocks_that_nobody_admits_to_own():
    blocks = manager()
    seq = computed(blocks, sequence(0, 9))
    assert blocks.check([seq]) == 0
    assert blocks.check([]) == 3


def test_forgetting_prefixes_makes_the_cache_cold():
    blocks = manager()
    blocks.free(computed(blocks, sequence(0, list(range(9)))))
    blocks.forget_prefixes()
    late = sequence(1, list(range(9)))
    assert blocks.allocate(late, 9) and late.num_computed_tokens == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(0, 2)), max_size=60), st.booleans())
def test_every_block_has_one_fate(actions, caching):
    """Random allocations (of few distinct prompts, so that prefixes are shared), growth and frees."""
    blocks, living = manager(12, caching), []
    for number, (action, size, kind) in enumerate(actions):
        if action < 2:
            seq = sequence(number, [kind] * size)
            if blocks.allocate(seq, size):
                seq.num_computed_tokens = size
                blocks.commit(seq)
                living.append(seq)
        elif living and action == 2:
            blocks.grow(living[size % len(living)], size + 8)
        elif living:
            blocks.free(living.pop(size % len(living)))
        assert blocks.check(living) == 0
        owners = [block for seq in living for block in seq.block_table]
        assert all(blocks.pool.ref_count(block) == owners.count(block) for block in range(12))
    for seq in living:
        blocks.free(seq)
    assert blocks.num_free == 12
