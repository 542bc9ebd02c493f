"""Fault F4: no room, no permission or a broken disk, at every place of the source that writes a file of a run."""

from __future__ import annotations

import errno
import os
import re

import pytest

from .kill_harness import Lab, leftovers

LINE = r"u2a run: (?P<path>.+?): cannot be written: (?P<reason>[^(]+) \((?P<free>\d+) bytes free there\); [^\n]+\n"


def refuse_everywhere(lab: Lab, number: int, lasting: bool, sites: list[str]) -> list[str]:
    """Refuse one site after the other, each run going on where the one before was refused; returns what is wrong."""
    lab.fresh()
    wrong = []
    for site in sites:
        status = lab.attempt(folder=str(lab.run), site=site, errno=number, lasting=lasting)["status"]
        said = re.fullmatch(LINE, lab.said)
        if status == 0:  # what is written here was there already: met in a new run
            lab.fresh()
            status = lab.attempt(folder=str(lab.run), site=site, errno=number, lasting=lasting)["status"]
            said = re.fullmatch(LINE, lab.said)
        if status != 2 or said is None:
            wrong.append(f"{site}: status {status}: {lab.said[-600:]}")
        elif not said["path"].startswith(str(lab.run)) or said["reason"] != os.strerror(number):
            wrong.append(f"{site}: {lab.said}")
    if lab.attempt()["status"] != 0:
        wrong.append(f"it does not go on: {lab.said[-600:]}")
    return [*wrong, *lab.differences(), *leftovers(lab.run)]


def test_a_run_writes_at_many_places(lab: Lab) -> None:
    assert len(lab.sites) >= 30
    assert {site.split(" in ")[0] for site in lab.sites} == {"mkdir", "open", "write", "fsync", "replace", "tensors"}


@pytest.mark.timeout(600)
def test_a_full_disk_is_one_clear_line_and_the_run_goes_on(lab: Lab) -> None:
    assert refuse_everywhere(lab, errno.ENOSPC, True, lab.sites[2::8]) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
def test_every_error_at_every_site(lab: Lab, number: int) -> None:
    lasting = number in (errno.ENOSPC, errno.EROFS)
    assert refuse_everywhere(lab, number, lasting, lab.sites) == []
