"""The timer that every measurement of cost shares."""

from __future__ import annotations

import itertools

from experiments.harness import cost


def test_pieces_are_timed_in_rotating_order_and_the_first_round_does_not_count(monkeypatch):
    """Each piece takes as many seconds as pieces have run so far."""
    done, clock = [], itertools.accumulate(itertools.chain.from_iterable((0, n) for n in itertools.count(1)))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
    seconds = cost.times_in_turn("abc", 3, lambda name, turn: cost.timed(lambda: done.append(f"{name}{turn}")))
    assert " ".join(done) == "a0 b0 c0 b1 c1 a1 c2 a2 b2 a3 b3 c3"
    assert seconds == {"a": 8, "b": 9, "c": 7}
