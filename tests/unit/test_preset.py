"""The shipped presets as they are: how much of a live run is timed, and how live runs are cut into jobs."""

from collections import Counter

import pytest

from mobile.policies.strategy import resolve, strategies
from suites.measure.generate import checked_strategies
from suites.plan.preset import read_preset
from suites.record import RunFolder
from suites.run.jobs import jobs
from suites.run.work import KINDS


def test_every_way_to_answer_is_timed_whole_once_and_a_fixed_part_of_it_elsewhere():
    preset = read_preset("cpu")
    [part] = {cell.timed for cell in preset.scored if cell.timed}
    whole = Counter(cell.generation for cell in preset.scored if cell.timed is None)
    for generation in preset.generations:
        strategy = resolve(generation.strategy, generation.gamma)
        if generation.scrambled or not strategy.lossless or strategy.routes_as_full_k:
            assert whole[generation] == 1
        else:  # its answers are full K's: it is asked for its times alone
            assert whole[generation] == 0
            assert generation.items == part
    for cell in preset.scored:
        assert len(cell.docs) == (cell.generation.items if cell.timed is None else part)
        assert cell.strategy not in ("resident", "mobile", "ser") or cell.timed is None or cell.budget != "smallest"


@pytest.mark.parametrize("name", ["smoke", "cpu"])
def test_live_runs_are_cut_into_jobs_once_each_and_few_are_spread(name, tmp_path):
    preset = read_preset(name)
    cut = jobs(preset.generations, RunFolder(tmp_path))
    assert Counter(each for job in cut for each in job.labels) == Counter(one.id for one in preset.generations)
    sizes = [len(job.labels) for job in cut]
    assert max(sizes) - min(sizes) <= 1, "one job is longer than the others, which all wait for in the end"
    assert sizes == [1] * 4 if name == "smoke" else max(sizes) == KINDS["generate"].most


@pytest.mark.parametrize("name", ["smoke", "cpu"])
def test_every_strategy_is_checked_on_every_model_and_every_gating_on_every_task(name):
    preset = read_preset(name)
    checked: dict[str, set[str]] = {}
    for generation in preset.generations:
        model, strategy = generation.model.name, resolve(generation.strategy, generation.gamma)
        tasks = list(dict.fromkeys(cell.task for cell in preset.scored if cell.model.name == model))
        found = checked_strategies(generation, tasks)
        checked.setdefault(model, set()).update(one.name for one in found)
        assert found, "its tokens alone are held against the batch's under nothing"
        assert strategy.routes_as_full_k or found == [strategy]
    for cell in preset.scored:
        strategy = resolve(cell.strategy, cell.gamma)
        assert strategy.needs_future or strategy.name in checked[cell.model.name], cell.label


def test_where_the_run_s_tasks_are_not_known_every_strategy_is_checked():
    full = next(each for each in read_preset("smoke").generations if each.strategy == "resident")
    served = {one.name for one in strategies().values() if one.routes_as_full_k and not one.needs_future}
    assert {one.name for one in checked_strategies(full, [])} == served
