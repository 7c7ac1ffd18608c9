"""Another library's error in a sentence of ours."""

from __future__ import annotations

import errno
import os

import pytest

from mobile.errors import one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("It is wrong."), "It is wrong"),
        (ValueError("One of:\n  (1) this\n  (2) that\n\nAnd a long story."), "One of: (1) this (2) that"),
        (ValueError("\n\n It is wrong:\n\n"), "It is wrong"),
        (ValueError(), "ValueError"),
        (KeyError("name"), "'name'"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file"), "No space left on device"),
        (ValueError("half \ud800 a pair"), "half \\ud800 a pair"),
    ],
)
def test_it_is_one_line_without_a_full_stop_that_can_be_printed_anywhere(error, line):
    assert one_line(error) == line
