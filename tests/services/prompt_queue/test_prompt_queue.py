import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
from prompt_queues import entries, ids, make_queue, records

from mara_rl.common.errors import ConfigError, DataError
from mara_rl.prompts.prompt_files import PromptRecord
from services.cluster.redis_server import connect
from services.prompt_queue.prompt_epochs import epoch_order
from services.prompt_queue.prompt_queue import PromptQueue


def silence(queue: PromptQueue, consumer: str) -> None:
    """Make ``consumer`` look as if its last sign of life was an hour ago."""
    queue._client.zincrby(queue._alive, -3_600_000, consumer)


# Order and epochs ---------------------------------------------------------------------------------


def test_order_is_the_seeds_and_the_epochs():
    repeats = {f"p{i}": 1 for i in range(50)}
    first = epoch_order(repeats, seed=1, epoch=0)
    assert first == epoch_order(dict(reversed(repeats.items())), seed=1, epoch=0)
    names = [ticket.prompt_id for ticket in first]
    assert sorted(names) == sorted(repeats)
    for other in (epoch_order(repeats, seed=1, epoch=1), epoch_order(repeats, seed=2, epoch=0)):
        assert [ticket.prompt_id for ticket in other] != names


def test_a_prompt_more_leaves_the_order_of_the_others():
    repeats = {f"p{i}": 2 for i in range(20)}
    before = epoch_order(repeats, seed=3, epoch=4)
    after = epoch_order({**repeats, "new": 1}, seed=3, epoch=4)
    assert [ticket for ticket in after if ticket.prompt_id != "new"] == before


def test_epochs_follow_each_other_in_their_order(empty_redis):
    queue = make_queue(empty_redis, 5, seed=9)
    read = [queue.read("a", 2) for _ in range(6)]
    names = ids(prompt for batch in read for prompt in batch)
    expected = [
        ticket.prompt_id
        for epoch in range(3)
        for ticket in epoch_order({f"p{i}": 1 for i in range(5)}, seed=9, epoch=epoch)
    ]
    assert names == expected[: len(names)]
    assert len(names) > 8
    assert read[0][0].text == "text " + read[0][0].prompt_id[1:]


def test_repeats_make_that_many_entries(empty_redis):
    queue = make_queue(empty_redis)
    queue.push(records(4), repeats=3)
    assert Counter(ids(queue.read("a", 100))) == {f"p{i}": 3 for i in range(4)}


def test_filling_twice_is_filling_once(empty_redis):
    queue = make_queue(empty_redis, 4)
    assert [queue.fill(0), queue.fill(0)] == [4, 0]
    assert queue.status().waiting == 4


def test_a_fill_that_breaks_off_leaves_nothing(empty_redis, monkeypatch):
    queue = make_queue(empty_redis, 4)
    append = PromptQueue._append

    def break_off(self, pipe, tickets, *, ordered):
        append(self, pipe, tickets[:2], ordered=ordered)
        raise KeyboardInterrupt

    monkeypatch.setattr(PromptQueue, "_append", break_off)
    with pytest.raises(KeyboardInterrupt):
        queue.fill(0)
    monkeypatch.undo()
    assert queue.status().waiting == 0
    assert queue.fill(0) == 4


def test_two_readers_that_race_for_the_fill_fill_once(empty_redis):
    queue = make_queue(empty_redis, 50)
    barrier = threading.Barrier(8)

    def fill(epoch: int) -> int:
        rival = make_queue(empty_redis)
        barrier.wait()
        return rival.fill(epoch)

    for epoch in range(5):
        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(fill, [epoch] * 8)) == [0] * 7 + [50]
        assert queue.status().waiting == 50 * (epoch + 1)


def test_a_reader_overtaken_by_a_fill_does_not_fill_once_more(empty_redis, monkeypatch):
    queue, rival = make_queue(empty_redis, 4), make_queue(empty_redis)
    run = queue._run

    def overtaken(script, *args):
        result = run(script, *args)
        rival.fill(0)  # between our seeing the stream empty and our own fill
        return result

    monkeypatch.setattr(queue, "_run", overtaken)
    assert len(queue.read("a", 1)) == 1
    assert (queue.status().epoch, queue.status().waiting) == (0, 3)


def test_pushed_prompts_join_the_next_epoch(empty_redis):
    queue = make_queue(empty_redis, 3)
    assert len(queue.read("a", 1)) == 1
    assert queue.push(records(5)) == 2
    assert len(queue.read("a", 100)) == 2
    assert sorted(ids(queue.read("a", 100))) == [f"p{i}" for i in range(5)]


def test_push_refuses_another_text_under_a_known_id(empty_redis):
    queue = make_queue(empty_redis, 2)
    with pytest.raises(DataError, match="'p1' names another text in queue 'test'"):
        queue.push([PromptRecord("p9", "new"), PromptRecord("p1", "changed")])
    assert queue.status().prompts == 2
    assert queue.push(records(2)) == 0
    assert queue.push([]) == 0


def test_an_empty_queue_makes_readers_wait_for_a_push(empty_redis):
    queue = make_queue(empty_redis)
    began = time.monotonic()
    assert queue.read("a", 1, block_ms=300) == []
    assert time.monotonic() - began >= 0.3
    threading.Timer(0.3, lambda: make_queue(empty_redis, 1)).start()
    assert ids(queue.read("a", 1, block_ms=10_000)) == ["p0"]


def test_queues_do_not_touch_each_other(empty_redis):
    queue = make_queue(empty_redis, 2)
    other = PromptQueue(connect(empty_redis), "other")
    assert other.read("a") == []
    assert len(queue.read("a", 9)) == 2


@pytest.mark.parametrize("name", ["", "a b", "a{b}", "a:b", "ü"])
def test_queue_names(empty_redis, name):
    with pytest.raises(ConfigError, match="queue name"):
        PromptQueue(connect(empty_redis), name)


def test_bad_arguments(empty_redis):
    queue = make_queue(empty_redis, 1)
    with pytest.raises(ConfigError, match="repeats is 0"):
        queue.push(records(1), repeats=0)
    with pytest.raises(ConfigError, match="consumer name '@returned'"):
        queue.read("@returned")


# Readers, live and dead ---------------------------------------------------------------------------


def test_concurrent_readers_share_every_epoch_without_overlap(empty_redis):
    number, epochs, readers = 200, 3, 6
    make_queue(empty_redis, number)
    taken: list[tuple[str, str]] = []
    budget = count()

    def reader(name: str) -> None:
        queue = make_queue(empty_redis)
        while next(budget) < number * epochs:
            taken.extend((p.entry_id, p.prompt_id) for p in queue.read(name, 1))

    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(reader, [f"r{i}" for i in range(readers)]))
    assert len(taken) == len({entry for entry, _ in taken}) == number * epochs
    assert set(Counter(prompt for _, prompt in taken).values()) == {epochs}


def test_entries_outlive_a_crash_between_read_and_ack(empty_redis):
    pending = make_queue(empty_redis, 3).read("a", 2)
    again = make_queue(empty_redis)  # the same consumer in a new process
    assert again.read_pending("a") == pending
    assert len(again.read("a", 9)) == 1


def test_rereading_keeps_order_and_counts_as_no_failure(empty_redis):
    queue = make_queue(empty_redis, 4, max_failures=2, max_deliveries=2)
    pending = queue.read("a", 4)
    for _ in range(20):
        assert queue.read_pending("a") == pending
    queue.mark_delivered([pending[1].entry_id])
    assert queue.read_pending("a") == [pending[0], pending[2], pending[3]]
    silence(queue, "a")
    queue.reclaim(60_000)  # the first death on them, so none is dead yet
    assert queue.status().dead == 0


def test_reclaim_takes_from_the_dead_and_not_from_the_slow(empty_redis):
    queue = make_queue(empty_redis, 6)
    dead, slow = queue.read("dead", 2), queue.read("slow", 2)
    silence(queue, "dead")
    silence(queue, "slow")
    queue.beat("slow")
    assert queue.reclaim(60_000) == 2
    assert queue.read_pending("slow") == slow
    assert queue.read("alive", 3) == [*dead, *queue.read_pending("alive")[2:]]
    assert set(queue.status().pending) == {"slow", "alive"}
    assert queue.reclaim(60_000) == 0


def test_reclaim_leaves_what_the_dead_had_delivered(empty_redis):
    queue = make_queue(empty_redis, 2)
    first, second = queue.read("dead", 2)
    queue.mark_delivered([first.entry_id])
    silence(queue, "dead")
    assert queue.reclaim(60_000) == 1
    assert queue.delivered() == [first.entry_id]
    assert queue.read("b", 1) == [second]


def test_a_delivery_that_is_sent_again_is_no_duplicate(empty_redis):
    """As the client does where the reply to it was lost; see `DELIVER`."""
    queue = make_queue(empty_redis, 3)
    pending = [prompt.entry_id for prompt in queue.read("runner", 2)]
    assert [queue._run("DELIVER", "batch", *pending) for _ in range(2)] == [2, 0]
    assert queue.status().duplicates == 0
    assert queue.mark_delivered(pending) == 0
    assert queue.status().duplicates == 2


def test_a_consumer_taken_for_dead_may_come_back(empty_redis):
    queue = make_queue(empty_redis, 3)
    (lost,) = queue.read("paused", 1)
    silence(queue, "paused")
    queue.reclaim(60_000)
    assert queue.read("other", 1) == [lost]
    assert queue.mark_delivered([lost.entry_id]) == 1
    queue.ack_delivered([lost.entry_id])
    assert queue.mark_delivered([lost.entry_id]) == 0  # the paused one finishes after all
    assert queue.status().duplicates == 1
    assert len(queue.read("paused", 9)) == 2


def test_release_hands_out_again_first(empty_redis):
    queue = make_queue(empty_redis, 5, max_deliveries=1)
    pending = queue.read("a", 2)
    assert queue.release("a") == 2
    assert queue.read("b", 2) == pending
    assert queue.status().pending.keys() == {"b"}
    assert queue.release("nobody") == 0


def test_a_prompt_that_kills_its_readers_becomes_a_dead_letter(empty_redis):
    queue = make_queue(empty_redis, 1, max_deliveries=3)
    for victim in ("a", "b", "c"):
        assert ids(queue.read(victim, 1)) == ["p0"]
        silence(queue, victim)
        assert queue.reclaim(60_000) == 1
    (letter,) = queue.dead_letters()
    assert letter["reason"] == "3 consumers died holding it"
    assert (letter["deliveries"], letter["failures"]) == ("3", "0")
    assert queue.status().waiting == 0


def test_a_prompt_is_a_dead_letter_once_though_two_of_its_entries_are_read(empty_redis):
    queue = make_queue(empty_redis, 1, max_failures=1)
    queue.fill(0)
    queue.fill(1)
    taken = queue.read("a", 2)
    assert ids(taken) == ["p0", "p0"]
    for prompt in taken:
        assert queue.fail(prompt.entry_id, "no reward") == "dead"
    assert [letter["epoch"] for letter in queue.dead_letters()] == ["0"]
    assert queue.status().waiting == 0
    assert queue.read_pending("a") == []


def test_a_dead_letter_s_other_entries_are_not_handed_out(empty_redis):
    queue = make_queue(empty_redis, 4, max_failures=1)
    queue.fill(0)
    queue.fill(1)
    first, *_ = queue.read("a", 4)
    queue.fail(first.entry_id, "no reward")
    queue.release("a")
    position = queue.position()
    left = [t.prompt_id for t in (*position.head, *position.tail)]
    assert first.prompt_id not in left
    taken = queue.read("b", 7)
    assert sorted(ids(taken)) == sorted(
        2 * [p for p in ("p0", "p1", "p2", "p3") if p != first.prompt_id]
    )
    queue.release("b")
    before = queue.position()
    queue.restart(before)
    assert queue.position() == before  # what a run that goes on has, one that was killed has too
    assert len(queue.dead_letters()) == 1


# Outcomes -----------------------------------------------------------------------------------------


def test_delivered_and_acked_entries_are_gone(empty_redis):
    queue = make_queue(empty_redis, 3)
    pending = entries(queue.read("a", 3))
    assert queue.mark_delivered(pending[:2]) == 2
    assert queue.delivered() == pending[:2]
    assert queue.ack_delivered(pending[:2]) == 2
    assert queue.ack_delivered(pending[:2]) == 0
    assert queue._client.hlen(queue._arrived) == 0  # the account does not grow with the run
    status = queue.status()
    assert (status.delivered, status.waiting, status.duplicates) == (0, 0, 0)
    assert {name: reader.pending for name, reader in status.pending.items()} == {"a": 1}
    assert entries(queue.read_pending("a")) == pending[2:]
    assert queue.mark_delivered([]) == queue.ack_delivered([]) == 0


def test_delivered_twice_is_counted(empty_redis):
    queue = make_queue(empty_redis, 2)
    pending = entries(queue.read("a", 2))
    assert queue.mark_delivered(pending[:1]) == 1
    assert queue.mark_delivered(pending, "batch") == 1
    assert queue.status().duplicates == 1
    assert queue.mark_delivered(pending, "batch") == 0  # the reply to the one before was lost
    assert queue.status().duplicates == 1


def test_failures_requeue_at_the_end_and_then_kill(empty_redis):
    queue = make_queue(empty_redis, 3, max_failures=2)
    first, second, third = queue.read("a", 3)
    assert queue.fail(first.entry_id, "reward timed out") == "again"
    assert queue.fail(first.entry_id, "reward timed out") == "gone"
    (again,) = queue.read("a", 1)
    assert again.prompt_id == first.prompt_id
    assert queue.fail(again.entry_id, "reward was NaN") == "dead"
    assert queue.dead_letters() == [
        {
            "epoch": "0",
            "prompt": first.prompt_id,
            "sample": "0",
            "failures": "2",
            "deliveries": "1",
            "reason": "reward was NaN",
            "text": first.text,
        }
    ]
    assert queue.read_pending("a") == [second, third]
    # Out of circulation: later epochs go without it.
    assert sorted(ids(queue.read("a", 9))) == sorted([second.prompt_id, third.prompt_id])


def test_a_delivered_entry_cannot_fail(empty_redis):
    queue = make_queue(empty_redis, 1)
    pending = entries(queue.read("a", 1))
    queue.mark_delivered(pending)
    assert queue.fail(pending[0], "late") == "gone"
    assert queue.delivered() == pending


def test_reject_and_requeue(empty_redis):
    queue = make_queue(empty_redis, 2)
    bad, _ = queue.read("a", 2)
    assert queue.reject(bad.entry_id, "longer than the context") == "dead"
    assert [letter["reason"] for letter in queue.dead_letters()] == ["longer than the context"]
    assert bad.prompt_id not in ids(queue.read("a", 9))
    assert queue.requeue_dead() == 1
    assert queue.status().dead == 0
    assert ids(queue.read("a", 1)) == [bad.prompt_id]
    assert bad.prompt_id in ids(queue.read("a", 9))
    assert queue.requeue_dead() == 0


def test_a_queue_of_dead_prompts_only_is_dry(empty_redis):
    queue = make_queue(empty_redis, 1)
    queue.reject(queue.read("a", 1)[0].entry_id, "empty")
    assert queue.read("a", 1) == []


def test_status(empty_redis):
    queue = make_queue(empty_redis, 6)
    pending = queue.read("a", 3)
    queue.read("b", 1)
    queue.mark_delivered([pending[0].entry_id])
    queue.reject(pending[1].entry_id, "empty")
    queue.release("b")
    silence(queue, "a")
    status = queue.status()
    assert (status.prompts, status.epoch, status.waiting) == (6, 0, 3)
    assert (status.delivered, status.dead, status.duplicates) == (1, 1, 0)
    assert status.pending.keys() == {"a"}
    assert status.pending["a"].pending == 1
    assert status.pending["a"].silent_s == pytest.approx(3600, abs=5)
