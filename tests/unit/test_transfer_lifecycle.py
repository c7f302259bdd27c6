"""The two ledgers: what is said to whom when, with a clock that stands still until it is moved."""

from __future__ import annotations

import pytest

from ksana_lab.core.connector import FirstToken, ReceivePlan
from ksana_lab.protocol import transfer as wire
from ksana_lab.protocol.engine import TransferKey
from ksana_lab.transfer.lifecycle import DecodeLedger, Pair, PrefillLedger

KEY = TransferKey("p:1__d:1", 7)
SESSION, WINDOW, SEQ, SERIAL = 5, 9, 3, 1
S = 1_000_000_000


class Said:
    """Collects effects; each is a short word."""

    def __init__(self) -> None:
        self.peer: list = []
        self.ranks: list = []
        self.news_: list = []

    def to_peer(self, session, message):
        assert session == SESSION
        self.peer.append(message)

    def to_ranks(self, message):
        self.ranks.append(message)

    def news(self, news):
        self.news_.append(news)

    def take(self) -> list[str]:
        """Everything since the last look, in order within each direction."""
        words = [f"peer:{type(m).__name__}" for m in self.peer] + [f"ranks:{type(m).__name__}" for m in self.ranks]
        words += [f"news:{n.kind}" for n in self.news_]
        self.peer, self.ranks, self.news_ = [], [], []
        return words


def announce(num_tokens=8, window=WINDOW, prompt_hash=b"") -> wire.Announce:
    return wire.Announce(SESSION, KEY, window, [1, 2], num_tokens, 0, prompt_hash)


def cancel(window=WINDOW) -> wire.Cancel:
    return wire.Cancel(SESSION, KEY, window, "client left")


@pytest.fixture
def p():
    said, sessions = Said(), {}
    ledger = PrefillLedger(2, lease_ns=60 * S, claim_ns=600 * S, session_of=lambda key: sessions.get(key, 0), effects=said)
    ledger.said, ledger.sessions = said, sessions
    return ledger


def drop_all(ledger: PrefillLedger, serial=SERIAL, window=WINDOW) -> None:
    for rank in (0, 1):
        ledger.on_dropped(rank, KEY, serial, window)


# ---- P ----------------------------------------------------------------------------------------------------------------


def test_p_never_sends_to_blocks_of_a_prompt_of_another_length(p):
    p.on_local(KEY, SEQ, SERIAL, 8, 0)
    p.on_announce(announce(num_tokens=1), 0)
    assert p.said.take() == ["peer:Failed", "ranks:Drop", "news:doomed"]


@pytest.mark.parametrize("announced_first", [True, False])
@pytest.mark.parametrize(("here", "there", "is_same"), [(b"a", b"b", False), (b"a", b"a", True), (b"a", b"", True), (b"", b"b", True)])
def test_p_never_sends_to_blocks_of_another_prompt_of_that_length(p, announced_first, here, there, is_same):
    steps = [lambda: p.on_announce(announce(prompt_hash=there), 0), lambda: p.on_local(KEY, SEQ, SERIAL, 8, 0, here)]
    for step in steps if announced_first else reversed(steps):
        step()
    assert (KEY in p.entries) == is_same
    if not is_same:
        (failed,) = [m for m in p.said.peer if isinstance(m, wire.Failed)]
        assert "8 tokens" in failed.reason and "tokenizers or chat templates differ" in failed.reason


def test_prompts_of_one_length_are_told_apart_by_their_ids():
    assert wire.hash_prompt([1, 2, 3]) != wire.hash_prompt([1, 3, 2]) and len(wire.hash_prompt([1])) == 8
    assert wire.hash_prompt(list(range(9))) == wire.hash_prompt(range(9))


@pytest.mark.parametrize("announced_first", [True, False])
def test_p_is_done_when_all_ranks_have_sent_and_the_scheduler_is_done(p, announced_first):
    steps = [lambda: p.on_announce(announce(), 0), lambda: p.on_local(KEY, SEQ, SERIAL, 8, 0)]
    for step in steps if announced_first else reversed(steps):
        step()
    p.on_first_token(KEY, SERIAL, FirstToken(42))
    p.on_rank_sent(0, KEY, SERIAL)
    p.on_rank_sent(1, KEY, SERIAL)
    assert p.said.take() == ["peer:FirstToken", "ranks:Target"]
    p.on_finished(KEY, SERIAL, 0)
    assert p.said.take() == ["news:sent"] and not p.entries


def test_p_tells_a_connected_d_what_it_has_begun_before_it_was_announced(p):
    p.sessions[KEY.comm_key] = SESSION
    p.on_local(KEY, SEQ, SERIAL, 8, 0)
    assert p.said.peer == [wire.Begun(SESSION, KEY)]
    p.on_announce(announce(), 0)
    p.on_abort(KEY, SERIAL, "client left", 0)
    assert "peer:Begun" not in p.said.take()[1:]


def test_d_need_not_wait_for_a_prompt_that_p_gave_up_before_it_began(p):
    p.sessions[KEY.comm_key] = SESSION
    p.on_abort(KEY, None, "queue full", 0)
    assert p.said.take() == ["peer:Begun"]
    p.on_announce(announce(), 0)
    assert p.said.take() == ["peer:Failed", "peer:CancelDone"]


def test_p_tells_what_it_has_begun_when_d_connects(p):
    given_up = TransferKey(KEY.comm_key, 8)
    p.on_local(KEY, SEQ, SERIAL, 8, 0)
    p.on_abort(given_up, None, "queue full", 0)
    p.on_local(TransferKey("p:1__e:1", 9), 4, 2, 8, 0)
    p.sessions[KEY.comm_key] = SESSION
    p.on_connected(KEY.comm_key)
    assert [m.key for m in p.said.peer] == [KEY, given_up]


def test_p_keeps_the_first_token_for_a_late_announcement(p):
    p.on_local(KEY, SEQ, SERIAL, 8, 0)
    p.on_first_token(KEY, SERIAL, FirstToken(42))
    assert p.said.take() == []
    p.on_announce(announce(), 0)
    assert p.said.peer[0].token_id == 42


def test_p_fails_a_finished_prompt_that_is_never_announced(p):
    p.on_local(KEY, SEQ, SERIAL, 8, 0)
    p.on_first_token(KEY, SERIAL, FirstToken(42))
    p.on_finished(KEY, SERIAL, 100 * S)
    p.expire(159 * S)
    assert p.said.take() == []
    p.expire(160 * S)
    assert p.said.take() == ["ranks:Drop", "news:doomed"]
    drop_all(p, window=0)
    assert "never announced" in p.said.news_[0].reason and p.num_lease_expiries == 1
    p.on_announce(announce(), 161 * S)
    assert p.said.take() == ["peer:Failed", "peer:CancelDone", "news:failed"]


def test_p_keeps_a_finished_prompt_longer_for_a_d_that_has_queued_it(p):
    p.on_local(KEY, SEQ, SERIAL, 8, 0)
    p.on_first_token(KEY, SERIAL, FirstToken(42))
    p.on_finished(KEY, SERIAL, 0)
    p.on_queued(wire.Queued(SESSION, KEY))
    p.expire(599 * S)
    assert p.said.take() == []
    p.expire(600 * S)
    assert "had no room for request 7.0 (waited 600 s)" in p.said.news_[0].reason


def test_p_fails_an_announcement_whose_request_never_comes(p):
    p.on_announce(announce(), 0)
    p.expire(600 * S)
    assert p.said.take() == ["peer:Failed", "ranks:Target", "ranks:Drop"]
    drop_all(p, serial=0)
    assert p.said.take() == ["peer:CancelDone"]
    p.on_local(KEY, SEQ, SERIAL, 8, 601 * S)
    assert p.said.take() == ["ranks:Drop", "news:doomed"]


def test_p_confirms_a_cancel_only_when_every_rank_has_dropped(p):
    p.on_local(KEY, SEQ, SERIAL, 8, 0)
    p.on_announce(announce(), 0)
    p.on_cancel(cancel(), 0)
    assert p.said.take() == ["ranks:Target", "ranks:Drop", "news:doomed"]
    p.on_dropped(0, KEY, SERIAL, WINDOW)
    p.on_cancel(cancel(), 0)  # said twice, answered once
    assert p.said.take() == []
    p.on_dropped(1, KEY, SERIAL, WINDOW)
    assert p.said.take() == ["peer:CancelDone", "news:failed"]


def test_p_confirms_the_cancel_of_what_it_does_not_know(p):
    p.on_cancel(cancel(), 0)
    assert p.said.take() == ["peer:CancelDone"]
    p.on_local(KEY, SEQ, SERIAL, 8, 0)
    assert p.said.take() == ["ranks:Drop", "news:doomed"]


def test_what_p_was_told_is_forgotten_in_time(p):
    p.on_cancel(cancel(), 0)
    p.expire(600 * S)
    p.on_local(KEY, SEQ, SERIAL, 8, 600 * S)
    assert p.said.take() == ["peer:CancelDone"] and KEY in p.entries


def test_p_does_not_tell_the_scheduler_what_it_did_itself(p):
    p.on_local(KEY, SEQ, SERIAL, 8, 0)
    p.on_announce(announce(), 0)
    p.on_abort(KEY, SERIAL, "client left", 0)
    assert p.said.take() == ["peer:Failed", "ranks:Target", "ranks:Drop"]
    drop_all(p)
    assert p.said.take() == ["peer:CancelDone", "news:failed"]


def test_p_refuses_a_second_announcement_of_the_same_request(p):
    p.on_announce(announce(), 0)
    p.on_announce(announce(window=10), 0)
    assert [m.window for m in p.said.peer] == [10, 10] and p.entries[KEY].window == WINDOW


def test_a_lost_session_dooms_its_requests_and_no_others(p):
    other = TransferKey("p:1__e:1", 8)
    p.on_local(KEY, SEQ, SERIAL, 8, 0)
    p.on_announce(announce(), 0)
    p.on_local(other, 4, 2, 8, 0)
    p.on_session_lost(SESSION, KEY.comm_key, "killed", 0)
    assert list(p.entries) == [other] and [n.seq_id for n in p.said.news_] == [SEQ]


def test_what_a_lost_d_had_not_announced_yet_ends_with_its_session(p):
    p.on_local(KEY, SEQ, SERIAL, 8, 0)
    p.on_finished(KEY, SERIAL, 0)
    p.on_session_lost(SESSION, KEY.comm_key, "killed", 0)
    drop_all(p, window=0)
    assert p.said.take() == ["ranks:Drop", "news:doomed", "news:failed"] and not p.entries
    p.on_announce(announce(), 1)
    assert [m.reason for m in p.said.peer if isinstance(m, wire.Failed)] == ["killed"]


def test_reports_of_an_earlier_sequence_with_the_same_key_are_ignored(p):
    p.on_local(KEY, SEQ, 2, 8, 0)
    p.on_announce(announce(), 0)
    p.on_first_token(KEY, 2, FirstToken(1))
    p.on_finished(KEY, 2, 0)
    for rank in (0, 1):
        p.on_rank_sent(rank, KEY, SERIAL)
    assert KEY in p.entries


# ---- D ----------------------------------------------------------------------------------------------------------------


class Pairs:
    def __init__(self) -> None:
        self.pair: Pair | None = Pair(SESSION, "p:1", 2)

    def __call__(self, comm_key):
        return self.pair


@pytest.fixture
def d():
    said, pairs = Said(), Pairs()
    ledger = DecodeLedger(
        2, 4, lease_ns=60 * S, timeout_ns=600 * S, pair_of=pairs, describe=lambda key: f"pair {key} is away", effects=said
    )
    ledger.said, ledger.pairs = said, pairs
    return ledger


PLAN = ReceivePlan(KEY, (1, 2), 8, 0)


def begin(ledger, *, until="announced"):
    ledger.on_local(PLAN, SEQ, 0)
    window = ledger.entries[KEY].window
    if until == "announced":
        for rank in (0, 1):
            ledger.on_armed(rank, window)
    ledger.said.take()
    return window


def test_d_announces_the_hash_of_its_prompt(d):
    d.on_local(PLAN, SEQ, 0, b"12345678")
    for rank in (0, 1):
        d.on_armed(rank, d.entries[KEY].window)
    (announced,) = d.said.peer
    assert announced.prompt_hash == b"12345678"
    assert wire.Decoder(wire.ToPrefill).decode(wire.encode(announced)) == announced


def test_d_announces_only_when_every_rank_accepts_writes(d):
    d.on_local(PLAN, SEQ, 0)
    window = d.entries[KEY].window
    d.on_armed(0, window)
    assert d.said.take() == ["ranks:Expect"]
    d.on_armed(1, window)
    assert d.said.take() == ["peer:Announce"]


def test_d_passes_on_what_p_has_begun_also_before_it_has_the_request(d):
    d.on_begun(wire.Begun(SESSION, KEY))
    d.on_begun(wire.Begun(SESSION + 1, KEY))
    assert [(n.kind, n.key) for n in d.said.news_] == [("begun", KEY)]


@pytest.mark.parametrize("queued_first", [True, False])
def test_d_says_that_it_has_queued_what_p_has_begun(d, queued_first):
    steps = [lambda: d.on_queued(KEY), lambda: d.on_begun(wire.Begun(SESSION, KEY))]
    for step in steps if queued_first else reversed(steps):
        step()
    assert d.said.peer == [wire.Queued(SESSION, KEY)]
    d.on_local(PLAN, SEQ, 0)
    d.on_begun(wire.Begun(SESSION, KEY))
    assert len(d.said.peer) == 1 and not d._begun and not d._queued


def test_d_forgets_what_it_had_queued_and_gave_up(d):
    d.on_queued(KEY)
    d.on_abort(KEY, "client left")
    d.on_begun(wire.Begun(SESSION, KEY))
    assert [type(m) for m in d.said.peer] == [wire.Cancel]


def test_d_runs_a_sequence_when_all_ranks_and_the_first_token_are_there(d):
    window = begin(d)
    d.on_rank_received(0, window)
    d.on_first_token(wire.FirstToken(SESSION, KEY, window, 42))
    assert d.said.take() == []
    d.on_rank_received(1, window)
    assert d.said.news_[0].first == FirstToken(42) and not d.by_window


def test_d_waits_for_its_pair_and_fails_with_its_name(d):
    d.pairs.pair = None
    d.on_local(PLAN, SEQ, 0)
    d.expire(59 * S)
    assert d.said.take() == []
    d.expire(60 * S)
    assert d.said.news_[0].kind == "failed" and "pair p:1__d:1 is away" in d.said.news_[0].reason


def test_d_announces_what_waited_when_its_pair_connects(d):
    pair, d.pairs.pair = d.pairs.pair, None
    d.on_local(PLAN, SEQ, 0)
    d.pairs.pair = pair
    d.on_connected(KEY.comm_key)
    assert d.said.take() == ["ranks:Expect"]


def test_d_does_not_wait_for_ever_for_kv(d):
    begin(d)
    d.expire(600 * S)
    assert d.said.take() == ["peer:Cancel", "ranks:Drop", "news:doomed"]


def test_d_gives_blocks_back_when_every_rank_has_dropped(d):
    window = begin(d)
    d.on_abort(KEY, "client left")
    assert [m.is_writer_stopped for m in d.said.ranks] == [False]
    assert d.said.take() == ["peer:Cancel", "ranks:Drop"]
    d.on_dropped(0, window)
    assert d.said.take() == []
    d.on_dropped(1, window)
    assert d.said.take() == ["news:failed"] and not d.by_window


def test_d_tells_its_ranks_when_the_writer_has_stopped(d):
    window = begin(d)
    d.on_abort(KEY, "client left")
    d.said.take()
    d.on_cancel_done(wire.CancelDone(SESSION, KEY, window))
    assert [m.is_writer_stopped for m in d.said.ranks] == [True]


def test_what_was_never_announced_has_no_writer(d):
    begin(d, until="arming")
    d.on_abort(KEY, "client left")
    assert d.said.ranks[0].is_writer_stopped and d.said.peer[0].window == 0


def test_messages_of_another_session_are_ignored(d):
    window = begin(d)
    d.on_failed(wire.Failed(SESSION + 1, KEY, window, "lie"))
    d.on_first_token(wire.FirstToken(SESSION + 1, KEY, window, 1))
    assert d.said.take() == [] and d.entries[KEY].first is None


def test_p_needs_no_cancel_for_what_it_has_failed_itself(d):
    window = begin(d)
    d.on_failed(wire.Failed(SESSION, KEY, window, "out of memory"))
    assert d.said.take() == ["ranks:Drop", "news:doomed"]


def test_an_abort_before_there_were_blocks_reaches_p(d):
    d.on_abort(KEY, "queue full")
    assert d.said.peer == [wire.Cancel(SESSION, KEY, 0, "queue full")]
