"""The short form of ``make faults``."""

import pytest

from tests.faults import Runner, full_disk, kills, read_only


@pytest.fixture
def runner(tmp_path):
    made = Runner(tmp_path, ["09"])
    yield made
    made.kill()


def test_a_study_that_is_killed_twice_ends_with_the_same_bytes(runner):
    assert kills(runner, 2, [], seed=1) == ""


def test_a_store_that_cannot_be_written_is_refused(runner):
    assert read_only(runner) == ""


def test_a_full_disk_is_told_and_with_room_again_the_run_ends_well(runner):
    assert full_disk(runner) == ""
