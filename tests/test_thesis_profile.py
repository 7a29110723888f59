"""The thesis profile's parts on their real interfaces, as small as they can be."""

import importlib
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partialmethod

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from torchvision.models import ResNet34_Weights, resnet34
from torchvision.models.segmentation import (
    DeepLabV3_ResNet101_Weights,
    deeplabv3_resnet101,
)

import run_all
from sdaug_utils import notebooks, params, plan, rates, summary, units
from sdaug_utils.compute import Batch
from sdaug_utils.data import datasets, images
from sdaug_utils.errors import InputError
from sdaug_utils.evidence import claims, figures, report
from sdaug_utils.experiments.base import check_percents
from sdaug_utils.generation import foundation, pools
from sdaug_utils.generation.technique import technique_requests
from sdaug_utils.generation.techniques import dreambooth_lora
from sdaug_utils.notebooks import NOTEBOOKS
from sdaug_utils.registry import techniques
from sdaug_utils.store import Store
from sdaug_utils.study import ROOT, Study, figures_folder, open_study, write_config
from sdaug_utils.training import features, runs, segmenter
from sdaug_utils.training.trainer import results_of


def changed(study, **sections):
    """A study with other settings: section by section, or a whole one."""
    updates = {
        name: getattr(study.settings, name).model_copy(update=value)
        if isinstance(value, dict)
        else value
        for name, value in sections.items()
    }
    settings = study.settings.model_copy(update=updates)
    return Study(study.profile, settings, study.data, study.store)


@pytest.fixture
def nothing_is_here(tmp_path, monkeypatch):
    """No model in the hub's cache, no data set in the project."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "PROJECT", tmp_path)
    for function in (foundation.revision, foundation._from_hub):
        function.cache_clear()


@pytest.mark.usefixtures("nothing_is_here")
def test_a_dry_run_needs_neither_data_nor_models(monkeypatch, capsys, tmp_path):
    arguments = ["--profile", "thesis", "--dry-run", "--output", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--only", "01", "08", "09", *arguments])
    assert run_all.main() == 0
    shown = capsys.readouterr().out
    assert "not here yet, planned by published sizes: stable-diffusion-v1-5" in shown
    assert "oxford-iiit-pet, food-101" in shown
    first, eighth, ninth = (
        next(line for line in shown.splitlines() if line.startswith(number))
        for number in ("01", "08", "09")
    )
    # 5 subjects, 4 numbers of images, 2 techniques; 4 prompts of 3 images
    assert "480 / 480" in first
    assert "40 / 40" in first
    assert "26 / 26" in eighth  # 24, and two of another number of updates
    # 101 classes, 3 draws: 20 images by prompts, 20 that follow control images
    assert "12120 / 12120" in ninth
    assert "GPU hours" in shown
    assert "by the thesis's logs" in shown
    assert "times as many" in shown


def seconds_of(study, *requested):
    """By the plan, of what some techniques are asked for."""
    what = plan.Wanted()
    for arguments in requested:
        what.ask(technique_requests(study, *arguments))
    return units.Work(plan.units({study: what})).seconds()


def test_hours_are_those_of_the_rates(world):
    each = rates.seconds_by_kind(world.settings)["image by a prompt"]
    planned = seconds_of(world, ("stable-diffusion-prompt", 0, 9))
    assert planned == pytest.approx(2 * 9 * each)
    assert seconds_of(world) == 0
    assert rates.thesis_hours("08-segmentation") == pytest.approx(1.65, abs=0.01)
    assert rates.thesis_hours("01-number-of-images") == 0


def test_images_take_as_long_as_their_number_of_steps():
    slow, fast = (params.load_settings(name) for name in ("thesis", "thesis-fast"))
    for kind in ("image by a prompt", "image with a ControlNet", "image of a personalised model"):
        whole, part = (rates.seconds_by_kind(settings)[kind] for settings in (slow, fast))
        assert part == pytest.approx(whole * 20 / 50)
    assert rates.seconds_by_kind(slow)["feature"] == rates.seconds_by_kind(fast)["feature"]


@pytest.mark.parametrize("profile", ["thesis", "thesis-fast", "miniature", "smoke"])
def test_no_rate_beats_the_peak_of_its_hardware(profile, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    flops = importlib.import_module("flops")
    settings = params.load_settings(profile)
    seconds, limits = rates.seconds_by_kind(settings), flops.limits(settings)
    assert seconds.keys() == limits.keys() | {rates.COMPILATION}
    assert all(0 <= limits[kind] < seconds[kind] for kind in limits)


@pytest.fixture
def captured_alone(monkeypatch):
    """Networks that are compiled are captured as a whole, and run without a compiler."""
    captured = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", captured)


def test_a_compiled_network_makes_the_same_images_and_copies_share_its_code(world, captured_alone):
    from torch._dynamo.utils import counters

    world = changed(world, dreambooth={"max_train_steps": 1, "prior_loss_weight": 0.0})
    elsewhere = Store(world.store.root / "compiled")
    compiled = replace(changed(world, compile=True), store=elsewhere)
    for technique in ("dreambooth", "controlnet-canny"):
        graphs = []
        for class_number in (0, 1):  # each with a U-Net of its own, if it is personalised
            counters.clear()
            plain, other = (
                pools.fill(study, technique_requests(study, technique, 0, 2)[class_number:][:1])
                for study in (world, compiled)
            )
            graphs.append(counters["stats"]["unique_graphs"])
            both = [np.stack(list(pool.images())).astype(float) for [pool] in (plain, other)]
            assert np.abs(both[0] - both[1]).mean() < 0.5
        assert graphs[0] > 0 == graphs[1]
    pools.loaded_pipelines.clear()


def test_what_is_to_be_compiled_needs_a_compiler(monkeypatch):
    settings = params.load_settings("smoke").model_copy(update={"compile": True})
    monkeypatch.setattr(foundation.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"compile: there is no compiler here: none of g\+\+"):
        foundation.check(settings)


def test_every_table_says_what_was_not_done_as_in_the_thesis(tmp_path):
    figures.save_table("thesis-fast", "some", pd.DataFrame({"score": [1.0]}))
    figures.save_table("thesis", "others", pd.DataFrame({"score": [1.0]}))
    told = pd.read_csv(next(tmp_path.rglob("some.csv")))
    assert told.to_dict("records") == [
        {"treatment": params.load_settings("thesis-fast").treatment, "score": 1.0}
    ]
    assert list(pd.read_csv(next(tmp_path.rglob("others.csv")))) == ["score"]


def test_a_model_that_is_not_kept_counts_where_its_images_are_still_to_be_made(world):
    def learnt(study, count):
        what = plan.Wanted()
        what.ask(technique_requests(study, "dreambooth", 0, count))
        return units.Work(plan.units({study: what})).counts()["models"]

    world = changed(world, dreambooth={"prior_loss_weight": 0.0, "keep_models": False})
    assert learnt(world, 1) == learnt(world, 3) == (2, 2)
    pools.technique_pools(world, "dreambooth", 0, 1)
    assert learnt(world, 1) == (0, 2)
    assert learnt(world, 3) == (2, 2)  # they were deleted when all that was asked for was made
    assert learnt(changed(world, dreambooth={"keep_models": True}), 1) == (0, 2)


def test_a_disk_that_is_too_small_stops_the_study_before_it_starts(monkeypatch, tmp_path):
    jobs = notebooks.check(notebooks.chosen(["04"]), "smoke", tmp_path)
    summary.require_disk(jobs, 2)
    usage = shutil._ntuple_diskusage(2**40, 2**40, 1000)
    monkeypatch.setattr(summary.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"not enough disk: the plan needs .* GiB in .* are free"):
        summary.require_disk(jobs, 2)


def test_a_batch_that_exceeds_the_memory_is_halved_down_to_one(capsys):
    seen = []

    def work(part):
        seen.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return [2 * item for item in part]

    batch = Batch(8, "sampling.batch_size")
    assert batch.run(work, range(10)) == [2 * item for item in range(10)]
    assert seen == [8, 4, 2, 2, 2, 2, 2]
    assert batch.run(work, [7]) == [14]
    shown = capsys.readouterr().out
    assert "sampling.batch_size: 8 exceed the GPU's memory: going on with 4" in shown

    def too_small(part):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with pytest.raises(InputError, match="too small even for one"):
        Batch(2, "sampling.batch_size").run(too_small, [1, 2])


def test_a_part_that_is_filled_up_to_a_batch_is_halved_like_a_whole_one():
    batch = Batch(4, "sampling.batch_size")

    def work(part):
        if batch.size > 2:  # what a pass has, however few are asked for
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return part

    assert batch.run(work, [7]) == [7]
    assert batch.size == 2


def test_a_pool_is_the_same_where_the_memory_is_short(world, tmp_path, monkeypatch):
    whole = pools.technique_pools(world, "stable-diffusion-prompt", 0, 4)
    pipeline_sampler = pools.pipeline_sampler

    def short(*arguments, **more):
        sampler = pipeline_sampler(*arguments, **more)

        def sample(indices, seeds):
            if len(seeds) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return sampler(indices, seeds)

        return sample

    monkeypatch.setattr(pools, "pipeline_sampler", short)
    elsewhere = Study(world.profile, world.settings, world.data, type(world.store)(tmp_path / "x"))
    parts = pools.technique_pools(elsewhere, "stable-diffusion-prompt", 0, 4)
    for one, other in zip(whole, parts, strict=True):
        assert one.seeds == other.seeds
        for a, b in zip(one.images(), other.images(), strict=True):
            assert np.abs(a.astype(int) - b).max() <= 1


def test_fine_tuned_models_go_once_their_images_are_made(world, tmp_path):
    kept = pools.technique_pools(world, "dreambooth", 0, 2)
    assert len(list((world.store.root / "dreambooth").glob("*/unet"))) == 2
    elsewhere = Study(world.profile, world.settings, world.data, type(world.store)(tmp_path / "x"))
    elsewhere = changed(elsewhere, dreambooth={"keep_models": False})
    for count in (1, 2):
        made = pools.technique_pools(elsewhere, "dreambooth", 0, count)
        assert not list((elsewhere.store.root / "dreambooth").glob("*/unet"))
    for one, other in zip(kept, made, strict=True):
        assert [file.read_bytes() for file in one.files] == [
            file.read_bytes() for file in other.files
        ]


def test_two_processes_may_pass_on_the_same_model(world):
    world = changed(world, dreambooth={"keep_models": False, "prior_loss_weight": 0.0})
    with ThreadPoolExecutor(2) as executor:
        both = executor.map(
            lambda count: pools.technique_pools(world, "dreambooth", 0, count),
            (1, 3),
        )
        few, many = both
    assert [len(pool.files) for pool in (*few, *many)] == [1, 1, 3, 3]
    assert not list((world.store.root / "dreambooth").glob("*/unet"))


def test_lora_is_a_technique_of_its_own_and_small(world):
    made = pools.technique_pools(world, "dreambooth-lora", 0, 2)
    assert [len(pool.files) for pool in made] == [2, 2]
    [first, _] = (world.store.root / "dreambooth-lora").glob("*/pytorch_lora_weights.safetensors")
    whole = foundation.MINIATURE_WEIGHTS / "unet" / "diffusion_pytorch_model.safetensors"
    assert first.stat().st_size < whole.stat().st_size / 10
    assert not (first.parent / "unet").exists()
    pipeline = foundation.load_pipeline(world.settings)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    adapted = techniques()["dreambooth-lora"].apply(pipeline, first.parent)
    assert any("lora" in name for name in adapted.unet.state_dict())
    assert all(
        torch.equal(before[name], value) for name, value in pipeline.unet.state_dict().items()
    )


def test_lora_learns(world, tmp_path):
    world = changed(world, dreambooth_lora={"max_train_steps": 30, "learning_rate": 1e-2})
    world = changed(world, dreambooth={"prior_loss_weight": 0.0})
    pipeline, lora = foundation.load_pipeline(world.settings), techniques()["dreambooth-lora"]
    [request, _] = technique_requests(world, "dreambooth-lora", 0, 1)
    for name in ("first", "second"):
        lora.learn(world, pipeline, [request], [tmp_path / name])
    first, second = (
        (tmp_path / name / dreambooth_lora.FILE).read_bytes() for name in ("first", "second")
    )
    assert first == second
    tuned = lora.apply(pipeline, tmp_path / "first")
    ups = [value for name, value in tuned.unet.state_dict().items() if "lora_B" in name]
    assert ups
    assert all(up.abs().max() > 0 for up in ups)  # they start at zero


def test_mixed_precision_and_checkpointing_change_memory_and_hardly_the_model(world):
    pipeline, technique = foundation.load_pipeline(world.settings), techniques()["dreambooth"]
    world = changed(world, dreambooth={"prior_loss_weight": 0.0})
    [request, _] = technique_requests(world, "dreambooth", 0, 1)  # the same seed for all
    weights = {
        name: technique.tuned(changed(world, **changes), pipeline, request).state_dict()
        for name, changes in {
            "plain": {},
            "checkpointing": {"dreambooth": {"gradient_checkpointing": True}},
            "mixed": {"training_precision": "mixed"},
        }.items()
    }
    for name, value in weights["plain"].items():
        assert torch.equal(value, weights["checkpointing"][name])
        assert (value - weights["mixed"][name]).abs().max() < 1e-3
    assert any(not torch.equal(v, weights["mixed"][n]) for n, v in weights["plain"].items())


def test_another_treatment_is_another_model_and_saving_memory_is_not(world):
    def key(**sections):
        request = technique_requests(changed(world, **sections), "dreambooth", 0, 1)[0]
        return request.model

    usual = key()
    assert key(dreambooth={"keep_models": False, "gradient_checkpointing": True}) == usual
    assert key(dreambooth={"optimizer": "adamw-8bit"}) != usual
    assert key(training_precision="mixed") != usual


def test_the_8_bit_optimiser_says_what_it_needs(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    world = changed(world, dreambooth={"optimizer": "adamw-8bit"})
    with pytest.raises(InputError, match="adamw-8bit needs bitsandbytes"):
        pools.technique_pools(world, "dreambooth", 0, 1)


def test_no_input_comes_from_outside_a_subset_that_is_smaller(world):
    """Of 99 images, 5 % are four: the fifth input would be a leak."""
    labels = np.repeat([0, 1], [100, 99])
    train = world.data.splits["train"]
    split = images.Split(lambda i: train.load(i % 40), labels, train.trimap, str)
    settings = world.settings.model_copy(
        update={"dreambooth": world.settings.dreambooth.model_copy(update={"num_input_images": 5})}
    )
    data = images.Dataset("99", world.data.class_names, {**world.data.splits, "train": split})
    study = Study("smoke", settings, data, world.store)
    for percent in (5, 10):
        run = runs.Run(
            protocol="controlled", real_percent=percent, draw=1, seed=0, technique="dreambooth"
        )
        assert runs.pool_percent(study, run) == (5 if percent == 5 else 100)
        inside = set(map(str, datasets.subset(labels, percent, 1)))
        requests = technique_requests(study, "dreambooth", 1, 1, runs.pool_percent(study, run))
        assert [len(request.inputs) for request in requests] == ([5, 4] if percent == 5 else [5, 5])
        assert all(set(images.digests(request.inputs)) <= inside for request in requests)
    check_percents(study, [5], {"dreambooth"})
    with pytest.raises(InputError, match="has 1 of a class: choose a larger percentage"):
        check_percents(study, [2], {"dreambooth"})


@pytest.fixture
def own_images(tmp_path, world):
    """A folder of two class folders, ten images each."""
    train = world.data.splits["train"]
    for row in (*range(10), *range(20, 30)):
        folder = tmp_path / "own" / ("tea_pot" if row < 20 else "mug")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(train.load(row)).save(folder / f"{row}.png")
    return tmp_path / "own"


def test_ones_own_images_take_the_place_of_the_data_set(own_images, monkeypatch, capsys, tmp_path):
    started, given = [], []

    def check(paths, profile, *rest):
        started.extend(paths)
        given.append(profile)
        return []

    monkeypatch.setattr(notebooks, "check", check)
    arguments = ["run_all.py", "--profile", "smoke", "--dataset", str(own_images), "--dry-run"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(summary, "print_plan", lambda *_: None)
    assert run_all.main() == 0
    assert [path.stem[:2] for path in started] == [f"0{number}" for number in range(1, 8)]
    assert "left out: 08 (no folder 'trimaps')" in capsys.readouterr().out
    (own_images / "trimaps").mkdir()
    assert [path.stem[:2] for path in notebooks.runnable_on(own_images, started)][-1] == "07"
    settings = params.load_settings(given[0])
    assert settings.data["main"].name == "imagefolder"
    assert settings.data["second"].name == "digits"
    data = datasets.load(**settings.data["main"].model_dump(exclude={"download"}))
    assert data.class_names == ("mug", "tea pot")
    assert [len(data.splits[name]) for name in images.SPLITS] == [10, 4, 6]


def test_grids_shrink_to_what_the_data_allow(own_images, store):
    """Two classes of four photographs, of which half are there to train on."""
    for folder in own_images.iterdir():
        for file in sorted(folder.iterdir())[4:]:
            file.unlink()
    study = open_study(write_config("smoke", dataset=own_images)[0], store)
    changed = {}
    for path in notebooks.chosen(["01", "02", "03", "04", "05", "06", "07"]):
        values = params.parameters_cell(path) | params.notebook_section("smoke", path.stem)
        checked = params.check_notebook(path.stem, values)
        new = checked.fitted(study)
        fitting = params.check_notebook(path.stem, values | new)
        fitting.check(study)  # nothing is amiss any longer
        assert not fitting.fitted(study)
        changed[path.stem[:2]] = new
    kinds = {"kinds": [["mug", "cup"], ["dress", "coat"]]}  # a class of the profile's, and none
    values = params.parameters_cell(NOTEBOOKS / "02-different-subjects.ipynb") | kinds
    checked = params.check_notebook("02-different-subjects", values)
    assert checked.fitted(study)["kinds"] == [["mug"], ["dress", "coat"]]
    assert changed["01"] == {"numbers_of_images": [1]}
    assert changed["03"]["real_percents"] == [100]
    assert changed["03"]["protocols_at_percent"] == 100
    assert set(changed["04"]["synthetic_per_class"]) == {100}
    assert claims.published_results(study.stands_for).empty
    assert not claims.published_results(open_study("smoke", store).stands_for).empty


def test_folders_of_one_name_have_figures_of_their_own(tmp_path, own_images):
    twin, protocol = tmp_path / "elsewhere" / "own", tmp_path / "published"
    for other in (twin, protocol):
        shutil.copytree(own_images, other)
    asked = [{"dataset": folder} for folder in (own_images, twin, protocol)]
    opened = [write_config("smoke", **each)[0] for each in (*asked, {"protocol": "published"})]
    assert len({figures_folder(profile) for profile in opened}) == len(opened)
    folders = [params.load_settings(profile).data["main"].folder for profile in opened]
    assert folders == [str(own_images), str(twin), str(protocol), None]


@pytest.fixture
def random_weights(monkeypatch):
    """torchvision's pinned weights as a download would leave them, but random."""
    torch.manual_seed(0)
    monkeypatch.setattr(
        ResNet34_Weights, "get_state_dict", lambda self, **_: resnet34().state_dict()
    )
    whole = deeplabv3_resnet101(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    ).state_dict()
    monkeypatch.setattr(DeepLabV3_ResNet101_Weights, "get_state_dict", lambda self, **_: whole)
    for loaded in (features.load_backbone, features.folded_backbone):
        loaded.cache_clear()
    yield
    for loaded in (features.load_backbone, features.folded_backbone):
        loaded.cache_clear()


@pytest.mark.usefixtures("random_weights")
def test_the_thesis_backbones_train_a_classifier_and_a_segmenter(world):
    classifier = {"backbone": "resnet34"}
    segmenting = {"backbone": "deeplabv3-resnet101", "keep_features": False, "image_size": 32}
    world = changed(world, classifier=classifier, segmenter=segmenting)
    assert features.load_backbone("resnet34")(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
    maps = segmenter.FeatureMaps(world).of(world.data.splits["train"].images(range(2)))([0, 1])
    assert maps.shape == (2, 2048, 4, 4)
    arms = [
        {"protocol": "published", "real_percent": 20},
        {"protocol": "controlled", "real_percent": 20},
        {"protocol": "controlled", "real_percent": 20, "task": "segmentation"},
    ]
    results = results_of(world, [runs.Run(draw=0, seed=0, **arm) for arm in arms])
    assert results["test_score"].between(0, 1).all()
    assert (results["num_updates"] > 0).all()


def test_tables_name_the_models_and_their_revision(world):
    named = report.models(params.load_settings("smoke"))
    assert named["text-to-image model"] == "miniature"
    assert named["classifier's backbone"].startswith("efficientnet-lite0 (579344")


def test_the_profile_uses_the_values_of_the_thesis_tables():
    tables = report.hyperparameters(params.load_settings("thesis"))
    rows = pd.concat(tables.values(), ignore_index=True)
    listed = rows[~rows["thesis"].str.contains("section|code|–")]
    assert len(listed) == 2 + 8 + 9  # as many as tables 4.1 to 4.3 have
    as_numbers = pd.to_numeric(listed["thesis"], errors="coerce").fillna(0)
    in_use = pd.to_numeric(listed["in use"], errors="coerce").fillna(0)
    differ = listed[(listed["thesis"] != listed["in use"]) & (as_numbers != in_use)]
    # The thesis's script scales this rate by the accumulation.
    assert differ[["hyperparameter", "in use"]].to_numpy().tolist() == [["learning_rate", "0.002"]]
