"""Cleanup steps: each is taken, the last first, whatever breaks off the work or a step; and none too late."""

from __future__ import annotations

import pytest

from mobile.live_model.cleanup import with_cleanup


def test_undisturbed_each_step_is_taken_once_the_last_first():
    """Taken again after the others, a step would undo what another thread does since the lock was given back."""
    taken: list[str] = []
    assert (
        with_cleanup(lambda steps: steps.extend([lambda: taken.append("lock"), lambda: taken.append("dtype")])) is None
    )
    assert taken == ["dtype", "lock"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("broken_off", ["first", "second", "third"])
def test_a_step_that_is_broken_off_is_taken_again_before_the_others(broken_off, error):
    taken: list[str] = []
    left = [broken_off]

    def step(name: str):
        def take() -> None:
            if name in left:
                left.remove(name)
                raise error
            taken.append(name)

        return take

    with pytest.raises(error):
        with_cleanup(lambda steps: steps.extend(map(step, ("third", "second", "first"))))
    assert taken == ["first", "second", "third"]


def test_a_step_that_always_raises_keeps_no_other_from_being_taken():
    taken: list[str] = []

    def broken() -> None:
        raise OSError("never")

    with pytest.raises(OSError, match="never"):
        with_cleanup(lambda steps: steps.extend([lambda: taken.append("first"), broken, lambda: taken.append("last")]))
    assert taken == ["last", "first"]


def test_work_that_raises_is_cleaned_up_after():
    taken: list[str] = []

    def work(steps: list) -> None:
        steps.append(lambda: taken.append("step"))
        raise ValueError("work")

    with pytest.raises(ValueError, match="work"):
        with_cleanup(work)
    assert taken == ["step"]
