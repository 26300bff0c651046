"""The number of threads follows the work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law

from coterie.ops import threads
from coterie.ops.threads import busy_threads, limited_threads

SHARE = 1000


@given(st.integers(0, 2**40), st.integers(1, 8))
@law(30)
def test_each_thread_has_a_share_that_is_worth_waking_it(multiplications: int, limit: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "MIN_SHARE", SHARE)
        patch.setattr(torch, "get_num_threads", lambda: limit)
        busy = busy_threads(multiplications)
    assert 1 <= busy <= limit
    assert busy == 1 or multiplications >= busy * SHARE
    assert busy == limit or multiplications < (busy + 1) * SHARE


def test_torch_takes_one_thread_for_small_work_and_all_again_after_it(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(threads, "MIN_SHARE", SHARE)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with limited_threads(20 * SHARE, regions=8):
            assert torch.get_num_threads() == 2
        with limited_threads(8, regions=8):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with limited_threads(10**9, regions=8):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
