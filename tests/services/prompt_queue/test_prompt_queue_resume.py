"""What a run that resumes, or whose Redis went away, finds in its prompt queue."""

import time

import pytest
import redis
from prompt_queues import entries, ids, make_queue

from mara_rl.common.errors import ConfigError, DataError
from mara_rl.prompts.prompt_files import PromptRecord
from services.cluster.redis_server import connect
from services.prompt_queue.prompt_epochs import QueuePosition
from services.prompt_queue.prompt_queue import PromptQueue, QueueLost


class Run:
    """One consumer that trains: reads, now and then fails, delivers, saves checkpoints."""

    def __init__(self, queue: PromptQueue) -> None:
        self.queue = queue
        self.log: list[tuple[str, str]] = []
        self.ready: list = []

    def train(self, steps: int, *, slots: int = 3) -> None:
        for _ in range(steps):
            while len(self.ready) < slots:
                self.ready += self.queue.read("runner", 2)
            prompt = self.ready.pop(0)
            self.log.append((prompt.prompt_id, prompt.text))
            if len(self.log) % 7 == 5:
                self.queue.fail(prompt.entry_id, "reward timed out")
            else:
                self.queue.mark_delivered([prompt.entry_id])

    def checkpoint(self) -> QueuePosition:
        position = self.queue.position()
        self.queue.ack_delivered(self.queue.delivered())
        self.ready = self.queue.read_pending("runner")
        return QueuePosition.model_validate_json(position.model_dump_json())


def uninterrupted(url: str, before: int, after: int) -> list[tuple[str, str]]:
    run = Run(make_queue(url, 10, seed=5, max_failures=99))
    run.train(before)
    run.checkpoint()
    run.train(after)
    return run.log


@pytest.mark.parametrize("before", [0, 4, 6, 11, 23])
@pytest.mark.parametrize("lost", ["nothing", "data"])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(redis_server, before, lost):
    client = connect(redis_server.url)
    client.flushall()
    expected = uninterrupted(redis_server.url, before, 30)

    client.flushall()
    run = Run(make_queue(redis_server.url, 10, seed=5, max_failures=99))
    run.train(before)
    position = run.checkpoint()
    log = list(run.log)
    run.train(9)  # lost work: no checkpoint follows
    if lost == "data":
        client.flushall()
    resumed = Run(make_queue(redis_server.url, 10, seed=5, max_failures=99))
    resumed.queue.restart(position)
    resumed.log = log
    resumed.train(30)
    assert resumed.log == expected
    if lost == "nothing":
        assert resumed.queue.status().duplicates > 0


def test_resume_after_a_checkpoint_whose_entries_were_never_acked(empty_redis):
    queue = make_queue(empty_redis, 6)
    pending = queue.read("a", 4)
    queue.mark_delivered(entries(pending[:2]))
    position = queue.position()  # saved, then the driver dies before ack_delivered
    queue.restart(position)
    assert queue.delivered() == []
    assert ids(queue.read("b", 2)) == ids(pending[2:])
    assert len(queue.read("b", 9)) == 2


def test_resume_from_an_older_checkpoint(empty_redis):
    queue = make_queue(empty_redis, 8)
    queue.read("a", 2)
    older = queue.position()
    pending = queue.read_pending("a")
    queue.mark_delivered(entries(pending))
    queue.ack_delivered(queue.delivered())
    queue.restart(older)
    assert ids(queue.read("b", 2)) == ids(pending)


def test_every_prompt_of_an_epoch_is_delivered_over_a_crash(empty_redis):
    queue = make_queue(empty_redis, 20)
    delivered: list[str] = []

    def work(steps: int) -> None:
        for _ in range(steps):
            (prompt,) = queue.read("a", 1)
            queue.mark_delivered([prompt.entry_id])
            delivered.append(prompt.prompt_id)

    work(5)
    position = queue.position()
    queue.ack_delivered(queue.delivered())
    work(4)
    queue.restart(position)
    work(15)
    assert len(delivered) == 24
    assert set(delivered) == {f"p{i}" for i in range(20)}
    assert queue.status().duplicates == 4


def test_two_epochs_in_the_stream_keep_their_position(empty_redis):
    queue = make_queue(empty_redis, 4)
    queue.fill(0)
    queue.fill(1)
    queue.read("a", 1)
    position = queue.position()
    expected = ids([*queue.read_pending("a"), *queue.read("a", 20)])
    assert len(expected) == 8
    queue.restart(position)
    assert queue.position() == position
    assert ids(queue.read("b", 20)) == expected


def test_a_new_run_starts_before_the_first_epoch(empty_redis):
    queue = make_queue(empty_redis, 5)
    first = ids(queue.read("a", 5))
    queue.mark_delivered(entries(queue.read("a", 2)))
    queue.restart()
    assert queue.status().epoch == -1
    assert ids(queue.read("b", 5)) == first


def test_restart_keeps_dead_prompts_out(empty_redis):
    queue = make_queue(empty_redis, 4)
    pending = queue.read("a", 2)
    queue.reject(pending[0].entry_id, "empty")
    queue.restart(queue.position())
    assert pending[0].prompt_id not in ids(queue.read("a", 9))


def test_resume_refuses_what_cannot_continue(empty_redis):
    queue = make_queue(empty_redis, 5)
    queue.read("a", 1)
    position = queue.position()
    with pytest.raises(ConfigError, match="seed of queue 'test' is 1, the checkpoint's 0"):
        make_queue(empty_redis, seed=1).restart(position)
    connect(empty_redis).flushall()
    with pytest.raises(DataError, match="has 3 prompts, the checkpoint's 5: push the prompt file"):
        make_queue(empty_redis, 3).restart(position)


def test_a_reader_is_told_that_redis_lost_the_queue(empty_redis):
    queue = make_queue(empty_redis, 2)
    connect(empty_redis).flushall()
    with pytest.raises(QueueLost, match="queue 'test' is missing from Redis"):
        queue.read("a", 1)
    with pytest.raises(QueueLost):
        queue.position()


def test_a_run_notices_that_the_queue_is_not_the_one_it_built(empty_redis):
    queue = make_queue(empty_redis, 2)
    queue.restart()
    queue.check_present()
    connect(empty_redis).flushall()
    make_queue(empty_redis)  # somebody else's: there is a queue again, but another one
    with pytest.raises(QueueLost):
        queue.check_present()


def test_duplicates_are_told_apart_on_a_redis_that_lost_its_data(empty_redis):
    queue = make_queue(empty_redis, 4)
    queue.restart()
    position = queue.position()
    queue.mark_delivered(entries(queue.read("a", 3)))
    seen = queue.seen()
    connect(empty_redis).flushall()
    again = make_queue(empty_redis, 4)
    again.remember(seen, duplicates=5)
    again.restart(position)
    again.mark_delivered(entries(again.read("b", 4)))
    assert again.status().duplicates == 5 + 3


def test_dead_prompts_stay_out_on_a_redis_that_lost_its_data(empty_redis):
    queue = make_queue(empty_redis, 4)
    queue.restart()
    dead = queue.read("a", 1)[0]
    queue.reject(dead.entry_id, "empty")
    position = queue.position()
    connect(empty_redis).flushall()
    again = make_queue(empty_redis, 4)
    again.restart(position)
    assert dead.prompt_id not in ids([*again.read("b", 4), *again.read("b", 4)])
    assert again.position().withdrawn == [dead.prompt_id]


def test_a_prompt_that_died_after_the_checkpoint_lives_again(empty_redis):
    queue = make_queue(empty_redis, 4, max_failures=1)
    queue.fail(queue.read("a", 1)[0].entry_id, "before")
    position = queue.position()
    lost = queue.read("a", 1)[0]
    queue.fail(lost.entry_id, "after")
    queue.restart(position)
    assert [letter["reason"] for letter in queue.dead_letters()] == ["before"]
    assert ids(queue.read("b", 1)) == [lost.prompt_id]
    assert len(queue.read("b", 9)) == 2


def test_withdrawn_prompts_are_dead_letters_once_and_never_read(empty_redis):
    queue = make_queue(empty_redis, 4)
    assert queue.withdraw(["p1", "p2"], "too long") == 2
    assert queue.withdraw(["p2"], "too long") == 0
    assert [letter["text"] for letter in queue.dead_letters()] == ["text 1", "text 2"]
    assert sorted(ids(queue.read("a", 9))) == ["p0", "p3"]
    assert queue.requeue_dead() == 2
    assert len(queue.read("a", 9)) == 4  # the next epoch has them again


def test_a_power_cut_loses_nothing(start_redis):
    own_redis = start_redis()
    queue = make_queue(own_redis.url, 10)
    pending = queue.read("a", 4)
    queue.mark_delivered([pending[0].entry_id])
    queue.reject(pending[1].entry_id, "empty")
    before, letters = queue.status(), queue.dead_letters()
    own_redis.kill()
    with pytest.raises(redis.ConnectionError):
        PromptQueue(connect(own_redis.url, retries=0), "test")
    own_redis.start()
    after = make_queue(own_redis.url)
    changed = {"pending"}  # holds times
    assert after.status().model_dump(exclude=changed) == before.model_dump(exclude=changed)
    assert after.dead_letters() == letters
    assert after.read_pending("a") == pending[2:]
    assert queue.read("a", 1)[0].text  # the old client finds the server again


def test_the_queue_of_a_finished_run_is_forgotten_unless_it_is_taken_up_again(redis_server):
    client = connect(redis_server.url)
    client.flushall()
    queue = make_queue(redis_server.url, 4)
    queue.withdraw(["p0"], "too long")
    queue.mark_delivered([queue.read("runner")[0].entry_id])
    position, keys = queue.position(), client.keys("mara:*")
    queue.expire(100)
    assert {client.ttl(key) for key in keys} <= {99, 100}
    queue.restart(position)
    assert {client.ttl(key) for key in client.keys("mara:*")} == {-1}
    queue.expire(100)
    queue.push([PromptRecord("new", "a text")])
    assert {client.ttl(key) for key in client.keys("mara:*")} == {-1}
    queue.expire(1)
    time.sleep(1.5)
    assert client.keys("mara:*") == []
