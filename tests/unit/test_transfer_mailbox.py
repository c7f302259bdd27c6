"""A queue between threads whose reader sleeps on a descriptor."""

import select

import pytest

from ksana_lab.transfer.mailbox import Mailbox


@pytest.fixture
def mailbox():
    made = Mailbox()
    yield made
    made.close()


def is_readable(mailbox):
    return bool(select.select([mailbox], [], [], 0)[0])


def test_what_is_put_in_wakes_the_reader_once(mailbox):
    mailbox.put("a")
    mailbox.put("b")
    assert is_readable(mailbox)
    assert mailbox.take_all() == ["a", "b"]
    assert not is_readable(mailbox)


def test_what_is_not_urgent_waits_for_a_ring_or_for_company(mailbox):
    mailbox.put("a", is_urgent=False)
    assert not is_readable(mailbox)
    mailbox.ring()
    assert is_readable(mailbox)
    assert mailbox.take_all() == ["a"]


def test_a_closed_mailbox_takes_no_offence(mailbox):
    mailbox.close()
    mailbox.put("a")
