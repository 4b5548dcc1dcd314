from __future__ import annotations

import gc
import threading
import weakref

from broker.transport import Connected, Delivery, Source
from tests.support.waiting import wait_for
from worker_client.mailbox import Bench, Finished, Mailbox


def parameters(version: int, *, epoch: int = 1, attempt: int = 0) -> Delivery:
    headers = {"epoch": epoch, "version": version, "attempt": attempt}
    return Delivery(source=Source.PARAMETERS, body=b"", headers=headers)


def test_of_the_parameters_only_the_newest_is_kept_and_everything_else_in_order() -> None:
    mailbox = Mailbox()
    notice = Delivery(source=Source.EVENT, body=b"")
    for item in (parameters(1), Connected(1), parameters(3), parameters(2), notice):
        mailbox.put(item)

    assert [mailbox.take(0) for _ in range(4)] == [Connected(1), notice, parameters(3), None]


def test_the_newest_is_told_by_epoch_before_version_before_attempt() -> None:
    mailbox = Mailbox()
    for item in (parameters(9, attempt=5), parameters(2, epoch=2), parameters(2, epoch=2, attempt=1), parameters(99)):
        mailbox.put(item)

    assert mailbox.take(0) == parameters(2, epoch=2, attempt=1)


def test_a_download_that_ended_is_kept_beside_a_newer_offer() -> None:
    mailbox = Mailbox()
    whole = Delivery(source=Source.PARAMETERS, body=b"", chunks=(b"",), headers={"version": 1})
    lost = Delivery(source=Source.PARAMETERS, body=b"", lost="gone", headers={"version": 2})
    for item in (whole, parameters(3), lost, parameters(4)):
        mailbox.put(item)

    assert [mailbox.take(0) for _ in range(4)] == [whole, lost, parameters(4), None]


def test_a_reader_that_waits_is_woken() -> None:
    mailbox = Mailbox()
    thread = threading.Timer(0.01, mailbox.put, [Connected(7)])
    thread.start()

    assert mailbox.take(10) == Connected(7)
    thread.join()


def test_the_bench_reports_results_and_errors() -> None:
    mailbox = Mailbox()
    bench = Bench(mailbox.put)
    error = ValueError("x")

    def fail(_: threading.Event) -> None:
        raise error

    bench.start(lambda _: 5)
    assert mailbox.take(10) == Finished(result=5)
    bench.start(fail)
    assert mailbox.take(10) == Finished(error=error)
    bench.close()


def test_abandoning_one_piece_of_work_does_not_touch_the_next() -> None:
    mailbox = Mailbox()
    bench = Bench(mailbox.put)

    bench.start(lambda abandon: abandon.wait(10))
    bench.abandon()
    assert mailbox.take(10) == Finished(result=True)
    bench.start(lambda abandon: abandon.is_set())
    assert mailbox.take(10) == Finished(result=False)
    bench.close()


def test_the_bench_keeps_neither_the_work_nor_its_result() -> None:
    """They hold a version and an update, while there may be nothing to do for long."""

    class Large:
        """What takes memory."""

    mailbox = Mailbox()
    bench = Bench(mailbox.put)
    version, update = Large(), Large()
    kept = [weakref.ref(version), weakref.ref(update)]
    bench.start(lambda _, version=version, update=update: (version, update))  # type: ignore[misc]
    del version, update

    assert isinstance(mailbox.take(10), Finished)
    wait_for(lambda: gc.collect() >= 0 and [ref() for ref in kept] == [None, None], what="both to be gone")
    bench.close()
