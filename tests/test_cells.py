import pandas as pd
import pytest

from sdaug_utils import cells, training


@pytest.fixture
def grid():
    return cells.grid("controlled", [100, 50], ["none", "custom"], ["dreambooth"], 3, 2, 2)


def test_a_grid_has_every_combination_once(grid):
    assert len(grid) == len(set(grid)) == 2 * 3 * 2 * 2
    assert {cell.arm for cell in grid} == {"baseline", "custom", "dreambooth"}
    counts = {cell.arm: cell.synthetic_per_class for cell in grid}
    assert counts == {"baseline": 0, "custom": 0, "dreambooth": 3}


def test_cells_are_trained_once_and_say_what_they_saw(world, grid, monkeypatch):
    assert cells.plan(world, grid)["already in the store"].sum() == 0
    results = cells.run(world, grid, progress=False)
    assert cells.plan(world, grid)["already in the store"].sum() == len(grid)
    baseline = results[(results["arm"] == "baseline") & (results["real_percent"] == 50)]
    assert set(baseline["num_real"]) == {20}
    assert set(baseline["num_synthetic"]) == {0}
    assert set(results[results["arm"] == "dreambooth"]["num_synthetic"]) == {6}
    assert len(set(results["num_updates"])) == 1
    assert all(
        row["correct"].mean() == pytest.approx(row["test_accuracy"])
        for _, row in results.iterrows()
    )
    assert cells.correct(results, "baseline", 100).shape == (2, 2, 10)

    monkeypatch.setattr(training, "train_controlled", lambda *_: pytest.fail("trained again"))
    again = cells.run(world, grid, progress=False)
    assert again.drop(columns="correct").equals(results.drop(columns="correct"))


def test_a_cell_depends_on_its_settings_and_data(world, grid):
    folder = cells._folder(world, grid[0])
    classifier = world.settings.classifier
    controlled = classifier.controlled.model_copy(update={"learning_rate": 0.5})
    changed = world.settings.model_copy(
        update={"classifier": classifier.model_copy(update={"controlled": controlled})}
    )
    other = type(world)(world.profile, changed, world.data, world.store)
    assert cells._folder(other, grid[0]) != folder
    published = grid[0].model_copy(update={"protocol": "published"})
    assert cells._folder(other, published) == cells._folder(world, published)


def test_a_missing_arm_is_an_error(world, grid):
    results = cells.run(world, grid[:1], progress=False)
    with pytest.raises(KeyError, match="no run of dreambooth at 5 % real"):
        cells.correct(results, "dreambooth", 5)


def test_incomplete_double_and_mixed_runs_are_refused(world, grid):
    results = cells.run(world, grid, progress=False)
    doubled = pd.concat([results, results])
    lacking = results.drop(index=0)
    mixed = results.assign(protocol=["published"] * 3 + ["controlled"] * (len(results) - 3))
    for frame in (doubled, lacking, mixed):
        with pytest.raises(ValueError, match="not one per draw and seed"):
            cells.correct(frame, "baseline", 100)


def test_curves_are_read_at_the_steps_asked_for(world, grid):
    curve = cells.accuracy_curve(world, grid[0], 0.1, [4, 10])
    assert curve["step"].tolist() == [4, 10]
    assert curve["test_accuracy"].between(0, 1).all()
