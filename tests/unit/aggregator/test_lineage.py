"""Rebuilding versions from a run's folder: what is left out, what is missing, what was altered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.archive import HEAD, base_file
from aggregator.core.ledger import Ledger
from aggregator.lineage import Lineage, Replay, ranges
from aggregator.reign import Reign
from aggregator.results import Outcome, write_results
from aggregator.rollback import adopt, find_checkpoint, open_lineage, roll_back
from broker.errors import CheckpointCorrupt, CheckpointOutdated, LineageError, StaleEpoch
from broker.messages import Array, Reason
from tests.support.builders import vector
from tests.support.ondisk import OnDisk

MODEL = {"w": np.arange(4, dtype=np.float32)}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., OnDisk]]:
    made: list[OnDisk] = []

    def build(name: str = "run", tensors: Mapping[str, Array] = MODEL, **config: Any) -> OnDisk:
        made.append(OnDisk(tmp_path / name, tensors, **config))
        return made[-1]

    yield build
    for one in made:
        one.close()


def lineage_of(run: OnDisk) -> Lineage:
    return open_lineage(run.folder, run.store)


def rebuilt(run: OnDisk, version: int, *leave_out: str) -> Replay:
    replay = Replay(lineage_of(run), run.store, frozenset(leave_out))
    replay.plan(version)
    for _ in replay.run():
        pass
    return replay


def rewrite(run: OnDisk, change: Callable[[dict[str, Any]], None], version: int) -> None:
    """Alter the history's line of ``version``."""
    file = run.folder / "history.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "version" and line["version"] == version:
            change(line)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


# -------------------------------------------------------------------------------------- the same numbers again


def test_an_optimiser_that_was_changed_and_changed_back_has_forgotten_everything(make: Callable[..., OnDisk]) -> None:
    run = make(optimizer="adam")
    run.round("a", "b")
    run.order(optimizer="sgd")
    run.order(optimizer="adam")
    run.round("a", "b")

    assert [line["step"] for line in run.lines()] == [0, 0]
    assert rebuilt(run, 2).original.digest == run.store.load().digest


def test_a_round_whose_settings_changed_at_a_restart_is_rebuilt_under_both(make: Callable[..., OnDisk]) -> None:
    run = make(buffer_size=3, weighting="examples")
    for index in range(3):
        if index == 2:
            run.tick(100)  # in a checkpoint, so that the restart has it
            run.settle()
            run.restart(weighting="uniform", staleness="constant", learning_rate=0.5)
        run.publish("a", run.random(index), examples=5)
        run.settle()

    (line,) = run.lines()
    assert [(count, settings["weighting"]) for count, settings in line["folds"]] == [(2, "examples"), (1, "uniform")]
    assert line["settings"]["weighting"] == "uniform"
    assert rebuilt(run, 1).original.digest == run.store.load().digest


def test_versions_that_the_history_lacks_yet_are_taken_from_the_checkpoint(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.round("a", "b", "a", "b")
    file = run.folder / "history.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if '"version": 2' not in line))

    # As a crash leaves it between the checkpoint and the line
    assert [record.version for record in run.store.load().records] == [2]
    assert rebuilt(run, 2).original.digest == run.store.load().digest


# -------------------------------------------------------------------------------------------- without a worker


def test_without_a_worker_is_the_run_that_never_had_it(make: Callable[..., OnDisk]) -> None:
    with_it = make("with", buffer_size=3, optimizer="adam", staleness="constant")
    never = make("never", buffer_size=2, optimizer="adam", staleness="constant")
    for number in range(4):
        for worker in ("a", "bad", "b"):
            tensors = with_it.random(10 * number + ord(worker[-1]))
            with_it.publish(worker, tensors)
            with_it.settle()
            if worker != "bad":
                never.publish(worker, tensors)
                never.settle()

    replay = rebuilt(with_it, 4, "bad")

    assert replay.original.digest == with_it.store.load().digest
    assert replay.result.digest == never.store.load().digest
    assert dict(replay.result.left_out) == {1: 1, 2: 1, 3: 1, 4: 1}
    mine, others = (one.store.load().parameters["w"].astype(np.float64) for one in (with_it, never))
    assert replay.distance == pytest.approx(float(np.linalg.norm(mine - others)))


def test_a_round_that_was_all_the_workers_makes_no_step(make: Callable[..., OnDisk]) -> None:
    run = make(momentum=0.9)
    run.round("a", "a")
    run.round("bad", "bad")
    run.round("a", "a")

    replay = rebuilt(run, 3, "bad")

    assert replay.result.version == 3
    assert (replay.original.optimizer.step, replay.result.optimizer.step) == (3, 2)
    np.testing.assert_array_equal(rebuilt(run, 2, "bad").result.parameters["w"], rebuilt(run, 1).result.parameters["w"])


def test_a_round_that_the_worker_spoiled_counts_without_it(make: Callable[..., OnDisk]) -> None:
    run = make(buffer_size=2, learning_rate=1.0)
    huge = {"w": vector(5e18, 5e18, 5e18, 5e18)}
    for _ in range(2):
        run.publish("bad", huge)
        run.settle()
        run.publish("a", {"w": vector(1, 0, 0, 0)})
        run.settle()
    run.publish("bad", {"w": vector(9.2e18, 9.2e18, 9.2e18, 9.2e18)})
    run.settle()
    run.publish("a", {"w": vector(1, 0, 0, 0)})
    run.settle()
    assert any(line.get("dropped") for line in run.lines()), "no step was spoiled"

    np.testing.assert_array_equal(rebuilt(run, 3, "bad").result.parameters["w"], MODEL["w"] + vector(3, 0, 0, 0))


# ---------------------------------------------------------------------------------------- what was kept, and when


def test_without_kept_updates_nothing_can_be_rebuilt(make: Callable[..., OnDisk]) -> None:
    run = make(keep_updates=False)
    run.round("a", "b")

    with pytest.raises(LineageError, match=r"version 1 was made of .* Set aggregator.keep_updates"):
        rebuilt(run, 1)
    with pytest.raises(LineageError, match="there is no version 9; the newest is 1"):
        rebuilt(run, 9)


def test_updates_that_are_kept_from_the_middle_of_a_round_on_rebuild_the_version_that_it_makes(
    make: Callable[..., OnDisk],
) -> None:
    run = make(keep_updates=False, buffer_size=3)
    run.round("a", "b", "a")
    run.round("bad", "b")
    run.tick(100)
    run.settle()
    run.restart(keep_updates=True)
    run.round("bad")
    run.round("a", "b", "bad")

    assert lineage_of(run).rebuildable() == [1, 2, 3]
    replay = rebuilt(run, 3, "bad")
    assert replay.base_version == 1
    assert replay.original.digest == run.store.load().digest
    # What is in the base cannot be taken out any more
    assert (dict(replay.result.stuck), replay.result.left_out[2], replay.result.left_out[3]) == ({2: 1}, 1, 1)


def test_versions_of_a_time_when_updates_were_not_kept_are_missing(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.round("a", "b", "a", "b")
    run.restart(keep_updates=False)
    run.round("a", "b")
    run.restart(keep_updates=True)
    run.round("a", "b", "a", "b")

    assert lineage_of(run).rebuildable() == [0, 1, 2, 3, 4, 5]
    run.restart(keep_updates=False)
    run.round("a", "b", "a", "b")
    with pytest.raises(LineageError, match=r"version 7 cannot be rebuilt.*version 7 was made of .* can be: 0-5$"):
        rebuilt(run, 7)
    assert rebuilt(run, 5).base_version == 3


def test_a_base_is_kept_again_if_somebody_has_deleted_it(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.round("a", "b")
    base_file(run.folder / "updates", 0).unlink()
    run.restart()
    run.round("a", "b")

    assert lineage_of(run).rebuildable() == [1, 2]


# ----------------------------------------------------------------------------------------------- damage


def archives(run: OnDisk) -> list[Path]:
    return sorted((run.folder / "updates").glob("*.log"))


def test_a_missing_update_is_named(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.round("a", "b")
    run.restart()
    run.round("a", "b")
    archives(run)[1].unlink()

    with pytest.raises(LineageError, match=r"version 2 was made of a/i/1, b/i/1, not to be found in .*: 0-1$"):
        rebuilt(run, 2)


def test_a_truncated_archive_is_named(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.round("a", "b", "a", "b")
    (file,) = archives(run)
    file.write_bytes(file.read_bytes()[:-7])

    with pytest.raises(LineageError, match=r"made of b/i/1, .*log cannot be read from byte \d+ on"):
        rebuilt(run, 2)
    assert rebuilt(run, 1).original.version == 1


def test_a_flipped_bit_is_found_where_it_is(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.round("a", "b")
    (file,) = archives(run)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(LineageError, match=r"update b/i/0 at byte \d+ does not match its checksum"):
        rebuilt(run, 1)

    # In the head of a message, its id cannot be read
    content[40] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(LineageError, match=r"made of a/i/0, .*the record at byte 0 is damaged"):
        rebuilt(run, 1)


def test_a_damaged_line_is_said_to_be_missing(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.round("a", "b", "a", "b", "a", "b")
    file = run.folder / "history.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line.replace("{", "", 1) if '"version": 2' in line else line for line in lines))

    with pytest.raises(LineageError, match=r"no line of version 2 \(damaged lines: 3\).* can be: 0-1$"):
        rebuilt(run, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.update(after="0" * 64), "version 2 came out otherwise: its line has digest 0000"),
        (lambda line: line["settings"].update(learning_rate=0.5), "version 2 came out otherwise"),
        (lambda line: line["updates"][0].update(staleness=3), "a/i/1 went in with weight 1.0, and .* make that 0.5"),
        (lambda line: line["updates"][0].update(weight=0.25), "a/i/1 went in with weight 0.25, and .* make that 1.0"),
        (lambda line: line["updates"][0].update(examples=7), "the kept update a/i/1 is not the one"),
        (lambda line: line["updates"].reverse(), None),
        (lambda line: line.update(settings={}), "does not say how it was made .settings.mode: Field required"),
        (
            lambda line: line["settings"].update(strategy="middle"),
            "no strategy is called .*: use the release that made the run",
        ),
        (lambda line: line.pop("updates"), "came out otherwise"),
        (lambda line: line.update(updates=3), "the line of version 2 is damaged: no list of updates"),
        (lambda line: line.update(epoch="x"), "the line of version 2 is damaged: epoch"),
        (lambda line: line.update(source=2), "version 2 cannot be made of version 2"),
        (lambda line: line.update(folds=[[1, line["settings"]]]), "tells of more or fewer updates"),
    ],
)
def test_an_altered_line_is_found_out(
    make: Callable[..., OnDisk], change: Callable[[dict[str, Any]], None], message: str | None
) -> None:
    run = make()
    run.round("a", "b", "a", "b")
    run.round("b", lag=1)
    run.round("a", lag=2)
    rewrite(run, change, 2)

    if message is None:  # two updates add up to the same in any order
        assert rebuilt(run, 2).original.version == 2
        return
    with pytest.raises(LineageError, match=message):
        rebuilt(run, 3)
    assert rebuilt(run, 1).original.version == 1


def test_another_update_under_a_kept_ones_name_is_found_out(make: Callable[..., OnDisk]) -> None:
    run, other = make("run"), make("other")
    run.round("a", "b", seed=1)
    other.round("a", "b", seed=2)
    archives(run)[0].write_bytes(archives(other)[0].read_bytes())

    with pytest.raises(LineageError, match="version 1 came out otherwise"):
        rebuilt(run, 1)


def test_a_damaged_base_is_passed_over_for_another(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.round("a", "b")
    first = base_file(run.folder / "updates", 0)
    content = first.read_bytes()
    first.unlink()
    run.restart()  # which keeps another
    run.round("a", "b")
    first.write_bytes(content)
    assert rebuilt(run, 2).base_version == 1
    assert rebuilt(run, 2, "a").base_version == 0
    second = base_file(run.folder / "updates", 1)
    second.write_bytes(second.read_bytes()[:-1])

    assert rebuilt(run, 2).base_version == 0
    first.write_bytes(content[:-1])
    with pytest.raises(LineageError, match="version 2 cannot be rebuilt"):
        rebuilt(run, 2)


# -------------------------------------------------------------------------------- earlier versions as the newest


def test_a_rollback_supersedes_the_aggregator_and_can_be_replayed(make: Callable[..., OnDisk]) -> None:
    run = make(optimizer="adam")
    run.round("a", "b", "a", "b", "a", "b", "a")
    state = find_checkpoint(lineage_of(run), run.store, 1)
    assert state is not None

    head = roll_back(lineage_of(run), run.store, 1, state.parameters, state.optimizer)

    with pytest.raises(StaleEpoch, match="has taken over"):
        run.store.write(run.machine.snapshot(5.0))
    assert (head.version, head.records[-1].source, len(head.records[-1].dropped)) == (4, 1, 0)
    run.restart()
    run.settle()  # what was not acknowledged comes again, from version 3, which is void
    assert run.rejected == [Reason.ROLLED_BACK]
    run.round("a", "b")
    assert run.lines()[-1]["step"] == 1
    assert rebuilt(run, 5).original.digest == run.store.load().digest
    assert lineage_of(run).rebuildable() == [0, 1, 2, 3, 4, 5]


def test_what_is_in_the_buffer_is_dropped_and_told(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.round("a", "b", "a", "b", "a")
    run.tick(100)
    run.settle()
    replay = rebuilt(run, 1)

    head = roll_back(lineage_of(run), run.store, 1, replay.result.parameters, replay.result.optimizer)

    assert [str(entry.id) for entry in head.records[-1].dropped] == ["a/i/2"]
    assert not head.entries
    assert len(Ledger(head.ledger)) == 5


def test_what_is_adopted_without_a_worker_goes_on_and_can_be_rebuilt_again(make: Callable[..., OnDisk]) -> None:
    run = make(buffer_size=3, momentum=0.9)
    run.round("a", "b", "a")
    run.round("a", "bad", "b")
    replay = rebuilt(run, 2, "bad")
    run.round("a", "bad", "b")  # the run has gone on meanwhile
    before = sorted(Ledger(run.store.load().ledger))

    head = adopt(replay, run.store, frozenset({"bad"}), go_on=True, report=lambda _: None)

    assert (head.version, head.records[-1].source, head.records[-1].without) == (4, 3, ("bad",))
    assert head.void == ((2, 3),)
    assert sorted(Ledger(head.ledger)) == before
    run.restart()
    run.publish("a", run.random(1), lag=1)  # version 3 came out otherwise
    run.publish("a", run.random(1), lag=3)  # version 1 did not
    run.settle()
    assert run.rejected == [Reason.ROLLED_BACK]
    run.round("b", "bad")
    assert rebuilt(run, 5).original.digest == run.store.load().digest
    assert rebuilt(run, 4).original.digest == head.digest

    # Again, and somebody else
    again = rebuilt(run, 5, "b")
    assert dict(again.result.left_out) == {1: 1, 2: 1, 3: 1, 5: 1}
    adopt(again, run.store, frozenset({"b"}), go_on=True, report=lambda _: None)
    run.restart()
    run.round("a", "a", "a")
    assert rebuilt(run, 7).original.digest == run.store.load().digest


def test_nothing_is_adopted_if_the_run_was_taken_back_meanwhile(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.round("a", "b", "a", "bad")
    replay = rebuilt(run, 2, "bad")
    state = rebuilt(run, 1).result
    roll_back(lineage_of(run), run.store, 1, state.parameters, state.optimizer)
    epoch = (run.store.folder / "epoch").read_text()

    with pytest.raises(LineageError, match="was taken back while this was going on"):
        adopt(replay, run.store, frozenset({"bad"}), go_on=True, report=lambda _: None)

    assert (run.store.load().version, (run.store.folder / "epoch").read_text()) == (3, epoch)


def test_a_checkpoint_of_another_run_is_no_version_of_this_one(make: Callable[..., OnDisk]) -> None:
    run, other = make("run"), make("other")
    run.round("a", "b", "a", "b", seed=1)
    other.round("a", "b", "a", "b", seed=2)
    for file in run.store.files():
        if run.store.read(file).version == 1:
            file.write_bytes(next(f for f in other.store.files() if other.store.read(f).version == 1).read_bytes())

    with pytest.raises(LineageError, match="not those that the history tells of"):
        find_checkpoint(lineage_of(run), run.store, 1)


def test_a_folder_whose_newest_state_is_damaged_or_old_is_not_taken_back(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.round("a", "b", "a", "b", "a", "b")
    state = rebuilt(run, 1).result
    newest = run.store.files()[0]
    content = newest.read_bytes()
    newest.write_bytes(content[:-1])
    with pytest.raises(CheckpointCorrupt, match="is newer and damaged: start 'fedmq aggregator' first"):
        roll_back(lineage_of(run), run.store, 1, state.parameters, state.optimizer)
    newest.unlink()
    with pytest.raises(CheckpointOutdated, match="tells of version 3: was an old copy restored"):
        roll_back(lineage_of(run), run.store, 1, state.parameters, state.optimizer)


def test_ranges_are_written_as_people_do() -> None:
    assert ranges([]) == ""
    assert ranges([3]) == "3"
    assert ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"


def test_the_summary_says_how_many_updates_were_taken_back(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.round("a", "b", "a", "b", "a", "b")
    state = find_checkpoint(lineage_of(run), run.store, 1)
    assert state is not None
    roll_back(lineage_of(run), run.store, 1, state.parameters, state.optimizer)
    run.restart()
    run.round("a", "b", "a")

    outcome = Outcome("stopped", run.version, 2, run.machine.applied, {}, 0, {}, buffered=run.machine.fill)
    write_results(run.folder, run.store, outcome, run.machine.parameters, seconds=1.0)

    updates = json.loads((run.folder / "summary.json").read_text())["updates"]
    assert (updates["applied"], updates["taken_back"]) == (9, 4)
    history = run.folder / "history.jsonl"
    history.write_text("".join(line for line in history.read_text().splitlines(True) if '"version": 5' not in line))
    write_results(run.folder, run.store, outcome, run.machine.parameters, seconds=1.0)
    assert json.loads((run.folder / "summary.json").read_text())["updates"]["taken_back"] is None


def test_a_later_base_spares_replays_a_damaged_record(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.round("a", "b", "a", "b")
    run.store.save(run.store.load(), base_file(run.folder / "updates", 2))
    run.round("a", "c")
    (file,) = archives(run)
    content = bytearray(file.read_bytes())
    content[HEAD.unpack_from(content)[0] + HEAD.size - 1] ^= 1  # in the first record's message
    file.write_bytes(content)

    assert rebuilt(run, 3).base_version == 2
    with pytest.raises(LineageError, match="does not match its checksum"):
        rebuilt(run, 3, "c")  # who is left out has to be from the beginning
    assert rebuilt(run, 0).original.version == 0


def test_an_aggregator_keeps_another_base_when_much_was_kept_and_no_round_is_open(make: Callable[..., OnDisk]) -> None:
    run = make()
    reign = Reign(run.machine, run.store.load(), run._archive, run.spool)
    versions = []
    for _ in range(40):
        run.round("a", "b", "a")
        reign.keep_another_base(run.store, run.store.load())
        versions = sorted(lineage_of(run).bases)

    assert len(versions) > 2
    assert all(not run.store.read(base_file(run.folder / "updates", version)).entries for version in versions)
    assert rebuilt(run, run.version).base_version == max(v for v in versions if v < run.version)
