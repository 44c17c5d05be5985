from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_privacy.accounting import Journal
from lightning_privacy.errors import ConfigurationError, GuaranteeError
from tests.accounting.goldens import release

ONE = release(1.0, 0.1)
OTHER = release(2.0, 0.1)


def run(journal: Journal, first: int, last: int, mechanism=ONE) -> None:
    """Releases number ``first`` to ``last``, as a training run would."""
    for number in range(first, last + 1):
        journal.reserve(number, mechanism)


def test_nothing_is_written_before_the_first_promise(tmp_path):
    journal = Journal(tmp_path / "deep" / "journal.jsonl", block=10)
    assert not journal.path.exists()
    assert journal.reserved == 0
    assert journal.charged() == ()
    assert journal.open_block() == 0


def test_releases_are_promised_in_blocks(tmp_path):
    journal = Journal(tmp_path / "deep" / "journal.jsonl", block=10)
    run(journal, 1, 11)
    assert journal.path.read_text().count("\n") == 2
    assert journal.reserved == 20
    assert journal.open_block() == 10
    assert journal.charged() == (ONE.times(10), ONE.times(10))


def test_a_record_closes_the_block_and_the_next_release_needs_a_new_one(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", block=10)
    run(journal, 1, 13)
    journal.record(13)
    assert (journal.reserved, journal.open_block()) == (13, 0)
    journal.record(13)  # nothing to say twice
    assert journal.path.read_text().count("\n") == 3
    run(journal, 14, 14)
    assert (journal.reserved, journal.open_block()) == (23, 10)
    again = Journal(journal.path, block=10)
    assert again.charged() == journal.charged()
    assert again.reserved == 23


def test_a_resume_charges_what_its_checkpoint_does_not_know(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", block=10)
    run(journal, 1, 7)
    journal.record(7)  # a checkpoint
    run(journal, 8, 12)  # then a crash
    resumed = Journal(journal.path, block=10)
    assert resumed.charged(after=7) == (ONE.times(10),)
    assert resumed.charged(after=17) == ()
    # The resumed run goes on behind everything charged, and can be resumed from the same place.
    run(resumed, 18, 18)
    assert Journal(journal.path, block=10).charged(after=7) == (ONE.times(10), ONE.times(10))


def test_charges_are_cut_inside_a_block(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", block=10)
    run(journal, 1, 20)
    assert journal.charged(after=4) == (ONE.times(6), ONE.times(10))


def test_another_mechanism_closes_the_block(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", block=10)
    run(journal, 1, 4)
    run(journal, 5, 6, OTHER)
    assert journal.charged() == (ONE.times(4), OTHER.times(10))
    assert Journal(journal.path, block=10).charged() == journal.charged()


def test_a_block_of_one_promises_each_release(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", block=1)
    run(journal, 1, 3)
    assert journal.reserved == 3
    assert journal.path.read_text().count("\n") == 3


@pytest.mark.parametrize("cut", [1, 10, -1])
def test_a_torn_last_line_was_never_promised(tmp_path, cut):
    journal = Journal(tmp_path / "journal.jsonl", block=5)
    run(journal, 1, 6)
    data = journal.path.read_bytes()
    first = data.index(b"\n") + 1
    journal.path.write_bytes(data[: first + cut] if cut > 0 else data[:cut])
    resumed = Journal(journal.path, block=5)
    assert resumed.reserved == 5
    run(resumed, 6, 6)
    assert Journal(journal.path, block=5).charged() == (ONE.times(5), ONE.times(5))


def test_a_file_of_nothing_but_a_torn_line_is_empty(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"entry"')
    journal = Journal(path, block=5)
    assert journal.reserved == 0
    run(journal, 1, 1)
    assert Journal(path, block=5).reserved == 5


def damaged(kind: str, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    return {
        "a changed number": data.replace(b'"count": 5', b'"count": 4', 1),
        "less noise": data.replace(b'"noise_multiplier": 1.0', b'"noise_multiplier": 9.0'),
        "a lost line": b"".join(lines[1:]),
        "a line twice": lines[0] + data,
        "no JSON": b"x" + data,
        "another version": data.replace(b'"version": 1', b'"version": 2'),
        "an empty line": lines[0] + b"\n" + b"".join(lines[1:]),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "a changed number",
        "less noise",
        "a lost line",
        "a line twice",
        "no JSON",
        "another version",
        "an empty line",
    ],
)
def test_a_damaged_line_is_refused(tmp_path, kind):
    journal = Journal(tmp_path / "journal.jsonl", block=5)
    run(journal, 1, 11)
    data = journal.path.read_bytes()
    assert damaged(kind, data) != data
    journal.path.write_bytes(damaged(kind, data))
    with pytest.raises(GuaranteeError, match="every complete line .* must be as it was written"):
        Journal(journal.path, block=5)


def test_a_record_outside_of_the_open_block_is_refused(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", block=5)
    run(journal, 1, 7)
    for count in (4, 11):
        with pytest.raises(GuaranteeError, match="must lie in the open block, between 5 and 10"):
            journal.record(count)
    journal.record(7)
    for count in (6, 8):
        with pytest.raises(GuaranteeError, match="must lie in the open block, between 7 and 7"):
            journal.record(count)


def test_a_checkpoint_that_knows_more_than_the_journal_is_refused(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", block=5)
    run(journal, 1, 1)
    with pytest.raises(GuaranteeError, match="6 releases in the checkpoint and 5 in journal.jsonl"):
        journal.charged(after=6)


def test_only_single_releases_are_promised(tmp_path):
    with pytest.raises(GuaranteeError, match="single releases of one mechanism"):
        Journal(tmp_path / "journal.jsonl", block=5).reserve(1, ONE.times(2))


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None])
def test_wrong_numbers_are_refused(tmp_path, bad):
    with pytest.raises(ConfigurationError, match="`block` must be a whole number >= 1"):
        Journal(tmp_path / "journal.jsonl", block=bad)
    journal = Journal(tmp_path / "journal.jsonl", block=5)
    with pytest.raises(ConfigurationError, match="`up_to` must be a whole number >= 1"):
        journal.reserve(bad, ONE)
    if bad != 0:
        with pytest.raises(ConfigurationError, match="`count` must be a whole number >= 0"):
            journal.record(bad)
        with pytest.raises(ConfigurationError, match="`after` must be a whole number >= 0"):
            journal.charged(bad)


def test_every_promise_is_flushed_before_it_is_kept(tmp_path, monkeypatch):
    flushed = []

    def watched(descriptor):
        flushed.append(Path(f"/proc/self/fd/{descriptor}").resolve())

    monkeypatch.setattr(os, "fsync", watched)
    journal = Journal(tmp_path / "deep" / "journal.jsonl", block=5)
    journal.reserve(1, ONE)
    # The file first, then the directory that has its name.
    assert flushed == [journal.path.resolve(), journal.path.parent.resolve()]
    journal.reserve(5, ONE)
    assert len(flushed) == 2
    journal.reserve(6, ONE)
    journal.record(6)
    assert flushed[2:] == [journal.path.resolve()] * 2


def test_what_is_flushed_is_the_whole_line(tmp_path, monkeypatch):
    seen = []
    path = tmp_path / "journal.jsonl"
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(path.read_bytes()))
    Journal(path, block=5).reserve(1, ONE)
    assert seen[0].endswith(b"\n")


def test_a_failed_promise_is_not_kept(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("no space left")

    journal = Journal(tmp_path / "journal.jsonl", block=5)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        journal.reserve(1, ONE)
    monkeypatch.undo()
    assert journal.reserved == 0
    journal.reserve(1, ONE)
    assert Journal(journal.path, block=5).charged() == (ONE.times(5),)


CHILD = """
import sys, time
from lightning_privacy.accounting import GaussianRelease, Journal
journal = Journal(sys.argv[1], block=5)
one = GaussianRelease(noise_multiplier=1.0, sample_rate=0.1, count=1)
for number in range(1, 8):
    journal.reserve(number, one)
    if number == 3:
        journal.record(3)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_process_has_paid_for_what_it_ran(tmp_path):
    path = tmp_path / "journal.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    with child:
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    journal = Journal(path, block=5)
    assert journal.charged(after=3) == (ONE.times(5),)
    assert journal.open_block() == 5


def test_a_long_run_keeps_one_entry_for_each_mechanism_in_a_row(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", block=2)
    run(journal, 1, 100)
    run(journal, 101, 200, OTHER)
    run(journal, 201, 300)
    journal.record(300)
    assert journal.charged() == (ONE.times(100), OTHER.times(100), ONE.times(100))
    assert journal.charged(after=150) == (OTHER.times(50), ONE.times(100))
    assert Journal(journal.path, block=2).charged(after=150) == journal.charged(after=150)
