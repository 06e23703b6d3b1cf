"""One run that nothing happens to, for all to be compared with."""

import pytest
from helpers.fault_runs import outcome, run


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "w"
    ended = run(workdir)
    assert ended.code == 0, ended.err
    return workdir


@pytest.fixture(scope="session")
def wanted(whole):
    """What every run must come to."""
    return outcome(whole)
