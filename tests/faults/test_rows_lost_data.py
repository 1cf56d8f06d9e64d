"""Redis loses what it had acknowledged: rows 14 and 24. The tokens that a client has are the truth."""

import json
import shutil

import pytest

from fastchat_q import keys
from tests.http_client import get
from tests.servers import CHOSEN
from tests.stack import RedisServer, Stack, wait_until
from tests.streams import LONG, WORDS, echo_worker, resume, second_api

from .kit import Recorder, assert_queue_is_clean, frozen
from .proxy import fault_proxy


def lose_everything(stack: Stack) -> None:
    """kill -9, and a start without the append-only file."""
    stack.server.kill()
    for path in stack.server.folder.glob("appendonly*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    stack.server.restart()


def test_row_14_redis_restarts_empty_and_open_streams_go_on_behind_what_their_clients_have(stack: Stack) -> None:
    echo_worker(stack)
    running = Recorder(stack.port)
    running.wait_words(40)
    lose_everything(stack)
    assert running.finish(60).split() == WORDS
    log = stack.redis.xrange(keys.model_keys("echo").log(running.job_id or ""))
    assert "".join(json.loads(fields["d"])["s"] for _, fields in log) == running.text
    early = running.pieces[len(running.pieces) // 10]
    before = "".join(piece.text for piece in running.pieces if piece.id <= early.id)
    rest = Recorder(stack.port, behind=(running.public_id or "", early.id))
    assert (before + rest.finish()).split() == WORDS, "no second beginning for who comes back with an old id"
    assert_queue_is_clean(stack, "echo")


def test_row_14_a_waiting_job_is_submitted_again_too(stack: Stack) -> None:
    echo_worker(stack, "--slots", "1")
    running, waiting = Recorder(stack.port), Recorder(stack.port)
    running.wait_words(10)
    wait_until(lambda: stack.live("echo") == 2, "both are queued")
    lose_everything(stack)
    assert running.finish(60).split() == WORDS
    assert waiting.finish(60).split() == WORDS


def test_row_14_a_job_that_nobody_reads_is_reported_lost_and_never_hangs(stack: Stack) -> None:
    echo_worker(stack)
    recorder = Recorder(stack.port, {**LONG, "on_disconnect": "continue"})
    recorder.wait_words(5)
    recorder.close()
    public_id = recorder.public_id
    lose_everything(stack)
    wait_until(lambda: get(stack.port, "/readyz").status == 200, "ready")
    for path in (f"/v1/jobs/{public_id}", f"/v1/jobs/{public_id}/events"):
        reply = get(stack.port, path)
        assert (reply.status, reply.error()["code"]) == (404, "job_not_found")


def test_row_24_a_log_that_was_rolled_back_gets_its_tokens_back_and_its_writer_is_fenced_out(stack: Stack) -> None:
    """What a replica that lagged behind would show after its promotion, made by hand."""
    worker = echo_worker(stack)
    recorder = Recorder(stack.port)
    recorder.wait_words(60)
    names = keys.model_keys("echo")
    with frozen(worker.pid):
        assert recorder.job_id is not None
        log, record = names.log(recorder.job_id), names.job(recorder.job_id)
        wait_until(lambda: recorder.last_id == int(stack.redis.hget(record, "n") or 0), "the client has all")
        entries = stack.redis.xrange(log)
        kept = entries[: len(entries) // 2]
        with stack.redis.pipeline() as pipe:
            pipe.delete(log)
            for entry_id, fields in kept:
                pipe.xadd(log, fields, id=entry_id)
            pipe.hset(record, "n", kept[-1][0].removeprefix("0-"))
            pipe.execute()
        wait_until(lambda: int(stack.redis.hget(record, "n") or 0) == recorder.last_id, "the tokens are put back")
    assert recorder.finish(60).split() == WORDS
    attempts = get(stack.port, f"/v1/jobs/{recorder.public_id}").json()["attempts"]
    assert attempts[0]["outcome"] == "log rolled back"


def test_row_24_an_answer_that_took_another_course_is_refused_to_who_comes_back_with_an_old_id(stack: Stack) -> None:
    worker = echo_worker(stack)
    recorder = Recorder(stack.port, {**LONG, "on_disconnect": "continue"})
    recorder.wait_words(60)
    names = keys.model_keys("echo")
    with frozen(worker.pid):
        assert recorder.job_id is not None
        log, record = names.log(recorder.job_id), names.job(recorder.job_id)
        wait_until(lambda: recorder.last_id == int(stack.redis.hget(record, "n") or 0), "the client has all")
        with stack.redis.pipeline() as pipe:
            pipe.delete(log)
            pipe.xadd(log, {"k": "2", "d": '{"t":[7,7],"s":"another course"}'}, id="0-2")
            pipe.hset(record, "n", 2)
            pipe.execute()
        with pytest.raises(AssertionError, match="stream_diverged"):
            recorder.finish()
        public_id = str(recorder.public_id)
        old = get(stack.port, f"/v1/jobs/{public_id}/events", last_event_id=str(recorder.last_id))
        assert (old.status, old.error()["code"]) == (400, "invalid_event_id")
        whole = resume(stack.port, public_id, None)
        assert whole.head()[0] == 200
        assert "another course" in next(block for block in whole.events() if "another" in block)


@pytest.mark.skipif(CHOSEN.cluster, reason="a node of a cluster takes no REPLICAOF: clusters promote by themselves")
def test_row_24_a_promotion_that_loses_the_last_tokens_costs_the_client_none(stack: Stack) -> None:
    """A real replica that lags behind while tokens flow, then is promoted, and everybody is sent to it."""
    folder = stack.folder / "replica"
    folder.mkdir()
    replica = RedisServer(folder)
    try:
        with fault_proxy(stack.server.socket) as front, fault_proxy(stack.server.socket, resp=False) as replication:
            replica_client = replica.client()
            replica_client.execute_command("REPLICAOF", "127.0.0.1", replication.port)
            wait_until(lambda: replica_client.info("replication")["master_link_status"] == "up", "it follows")
            port = second_api(stack, FASTCHAT_Q_REDIS_URL=front.url)
            echo_worker(stack, FASTCHAT_Q_REDIS_URL=front.url)
            wait_until(lambda: get(port, "/readyz").status == 200, "ready")
            recorder = Recorder(port)
            recorder.wait_words(30)
            with replication.frozen():
                recorder.wait_words(80)
                stack.server.kill()
                replication.cut()
                wait_until(lambda: replica_client.info("replication")["master_link_status"] == "down", "it is alone")
                replica_client.execute_command("REPLICAOF", "NO", "ONE")
            [record] = list(replica_client.scan_iter("fq:*:j:*"))
            assert int(replica_client.hget(record, "n") or 0) < recorder.last_id, "it lagged"
            front.redirect(replica.socket)
            assert recorder.finish(60).split() == WORDS
            replica_client.close()
    finally:
        replica.kill()
