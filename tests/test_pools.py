import csv
import dataclasses
import io
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdaug_utils.compute import Batch
from sdaug_utils.data import control, datasets, images
from sdaug_utils.errors import InputError
from sdaug_utils.generation import pool_files, pools
from sdaug_utils.generation import technique as techniques
from sdaug_utils.generation.foundation import load_pipeline
from sdaug_utils.generation.pool_files import image_seed
from sdaug_utils.registry import techniques as registered
from sdaug_utils.store import Store, digest_of
from sdaug_utils.study import Study, open_study

SPEC = {"class": "bag", "prompt": "a bag", "technique": "test"}


class FakeSampler:
    """Noise from each seed; may reject some, and may be killed after some."""

    def __init__(self, rejects=lambda seed: False, killed_after=None):
        self.asked: list[tuple[int, int]] = []
        self.rejects, self.killed_after = rejects, killed_after

    def __call__(self, items, seeds):
        if self.killed_after is not None and len(self.asked) >= self.killed_after:
            raise KeyboardInterrupt
        indices = [index for _, index in items]
        pairs = zip(indices, seeds, strict=True)  # the last may come again, to fill a pass
        self.asked += dict.fromkeys(pairs)
        return [None if self.rejects(seed) else self.image(seed) for seed in seeds]

    @staticmethod
    def image(seed):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8))


def grow(store, count, sampler=None, batch_size=3, max_attempts=5):
    batch = Batch(batch_size, "sampling.batch_size")
    asked = techniques.Request(None, SPEC, range(count), None, {}, (), None)
    [pool] = pools.grow(store, [asked], lambda: sampler, batch, max_attempts)
    return pool


def content(pool):
    return [file.read_bytes() for file in pool.files]


def test_a_larger_pool_begins_with_the_smaller_one(store):
    small = content(grow(store, 4, FakeSampler()))
    sampler = FakeSampler()
    large = grow(store, 10, sampler)
    assert content(large)[:4] == small
    assert [index for index, _ in sampler.asked] == [4, 5, 6, 7, 8, 9]
    assert content(grow(store, 4)) == small  # nothing to make: no sampler is asked for
    assert len(content(grow(store, 10))) == 10


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_batch_size_does_not_change_seeds(store, batch_size):
    pool = grow(store, 7, FakeSampler(), batch_size)
    assert pool.seeds == tuple(image_seed(SPEC, index, 0) for index in range(7))


def test_seeds_are_distinct_and_follow_the_specification():
    seeds = {image_seed(SPEC, index, attempt) for index in range(50) for attempt in range(3)}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert image_seed({**SPEC, "class": "dress"}, 0, 0) not in seeds


def test_an_interrupted_pool_goes_on_and_ends_with_the_same_bytes(store, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        grow(store, 10, FakeSampler(killed_after=6))
    sampler = FakeSampler()
    resumed = grow(store, 10, sampler)
    assert [index for index, _ in sampler.asked] == [6, 7, 8, 9]
    whole = grow(type(store)(tmp_path / "other"), 10, FakeSampler())
    assert content(resumed) == content(whole)
    metadata = [pool.files[0].parent / "metadata.csv" for pool in (resumed, whole)]
    assert metadata[0].read_bytes() == metadata[1].read_bytes()


def test_a_killed_writer_leaves_nothing_behind_and_a_pool_says_what_made_it(store):
    folder = grow(store, 2, FakeSampler()).files[0].parent
    (folder / ".00002.png.123").write_bytes(b"half")
    grow(store, 3, FakeSampler(), batch_size=2)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00000.png", "00001.png", "00002.png", "metadata.csv", "spec.json"]
    record = json.loads((folder / "spec.json").read_text())
    assert len(record.pop("made_with")) == 1
    assert record == {**SPEC, "batch_size": 2}


def test_pools_share_passes_and_are_the_same_as_alone(store, tmp_path):
    specs = [{**SPEC, "prompt": prompt} for prompt in ("a bag", "a large bag", "a dark bag")]
    asked = [techniques.Request(None, spec, range(3), None, {}, (), None) for spec in specs]
    passes = []

    class Counting(FakeSampler):
        def __call__(self, items, seeds):
            passes.append(len(items))
            return super().__call__(items, seeds)

    together = pools.grow(store, asked, Counting, Batch(8, "sampling.batch_size"), 5)
    assert passes == [8, 8]  # of nine images
    for number, request in enumerate(asked):
        other = Store(tmp_path / str(number))
        [alone] = pools.grow(other, [request], FakeSampler, Batch(8, "sampling.batch_size"), 5)
        assert content(alone) == content(together[number])
        assert alone.seeds == together[number].seeds
        folders = [pool.files[0].parent / "metadata.csv" for pool in (alone, together[number])]
        assert folders[0].read_bytes() == folders[1].read_bytes()


def test_the_specification_knows_precision_and_settings_but_not_batch_size(world):
    def spec(**sampling):
        changed = world.settings.sampling.model_copy(update=sampling)
        return techniques.pool_spec(
            world.settings.model_copy(update={"sampling": changed}), "test", "bag", "a bag", 0
        )

    assert spec(batch_size=7, max_attempts=3) == spec()
    assert spec(guidance_scale=3.0) != spec()
    halved = world.settings.model_copy(update={"precision": "bfloat16"})
    assert techniques.pool_spec(halved, "test", "bag", "a bag", 0) != spec()


def test_damaged_and_lost_images_are_made_again(store):
    pool = grow(store, 6, FakeSampler())
    before = content(pool)
    pool.files[1].write_bytes(before[1][:-30])
    pool.files[2].write_bytes(b"")
    pool.files[4].unlink()
    sampler = FakeSampler()
    assert content(grow(store, 6, sampler)) == before
    assert [index for index, _ in sampler.asked] == [1, 2, 4]


def test_rejected_images_are_replaced_with_the_next_attempts_seed(store):
    bad = {
        image_seed(SPEC, 1, 0),
        image_seed(SPEC, 1, 1),
        image_seed(SPEC, 3, 0),
    }
    pool = grow(store, 5, FakeSampler(rejects=bad.__contains__))
    assert pool.attempts == (1, 3, 1, 2, 1)
    assert pool.seeds[1] == image_seed(SPEC, 1, 2)


def test_an_image_that_is_always_rejected_is_an_error_by_name_and_the_others_stay(store):
    bad = {image_seed(SPEC, 1, attempt) for attempt in range(5)}
    with pytest.raises(RuntimeError, match="image 1 was rejected 5 times; choose another prompt"):
        grow(store, 4, FakeSampler(rejects=bad.__contains__))
    sampler = FakeSampler(rejects=bad.__contains__)
    pool = grow(store, 4, sampler, max_attempts=6)  # one attempt more is asked for
    assert pool.attempts == (1, 6, 1, 1)
    assert 0 not in {index for index, _ in sampler.asked}  # it is there already


def test_bits_that_flip_are_found_when_an_image_is_read_or_all_are_verified(store):
    pool = grow(store, 3, FakeSampler())
    before = content(pool)
    damaged = bytearray(before[1])
    damaged[-20] ^= 1
    pool.files[1].write_bytes(damaged)
    assert grow(store, 3) == pool  # to open a pool, sizes are enough
    assert len(pool.images()[0]) == 8
    with pytest.raises(InputError, match=r"00001.png: damaged: make it again"):
        pool.images()[1]
    pool_files.verify(store, SPEC)
    assert content(grow(store, 3, FakeSampler())) == before


def test_a_pool_is_grown_by_several_at_once(store, tmp_path):
    """Blocks of a pool do not wait for each other; what two ask for is made by one."""
    made = []

    class Noting(FakeSampler):
        def __call__(self, items, seeds):
            made.extend(dict.fromkeys(index for _, index in items))
            return super().__call__(items, seeds)

    def block(start):
        asked = techniques.Request(None, SPEC, range(start, start + 60), None, {}, (), None)
        pools.grow(store, [asked], Noting, Batch(7, "sampling.batch_size"), 5)

    with ThreadPoolExecutor(6) as executor:
        list(executor.map(block, [0, 60, 120, 180, 0, 90]))
    assert sorted(made) == list(range(240))
    together, alone = grow(store, 240), grow(Store(tmp_path / "other"), 240, FakeSampler())
    assert content(together) == content(alone)
    listings = [pool.files[0].parent / "metadata.csv" for pool in (together, alone)]
    assert listings[0].read_bytes() == listings[1].read_bytes()


def test_a_listing_is_made_again_and_what_is_not_listed_is_checked(store):
    """A process was killed behind an image and before its listing; one image was cut short."""
    bad = {image_seed(SPEC, 2, attempt) for attempt in (0, 1)}
    pool = grow(store, 4, FakeSampler(rejects=bad.__contains__))
    assert pool.attempts == (1, 1, 3, 1)
    listing = pool.files[0].parent / "metadata.csv"
    before, images = listing.read_bytes(), content(pool)
    listing.unlink()
    sampler = FakeSampler()
    assert grow(store, 4, sampler) == pool
    assert not sampler.asked
    assert listing.read_bytes() == before  # attempts and seeds included
    listing.unlink()
    pool.files[0].write_bytes(images[0][:-5])
    again = FakeSampler()
    assert content(grow(store, 4, again)) == images
    assert {index for index, _ in again.asked} == {0}


def test_what_a_listing_or_a_number_of_attempts_says_wrongly_is_made_again(store):
    bad = {image_seed(SPEC, 1, 0)}
    pool = grow(store, 3, FakeSampler(rejects=bad.__contains__))
    listing, images = pool.files[0].parent / "metadata.csv", content(pool)
    text = listing.read_text()
    listing.write_text(text.replace(pool.digests[0], "0" * 20))
    pool_files.verify(store, SPEC)
    assert content(grow(store, 3, FakeSampler(rejects=bad.__contains__))) == images
    assert listing.read_text() == text
    listing.unlink()
    pool.files[1].with_suffix(".attempts").write_text("")
    (pool.files[0].parent / "sheet.png").write_bytes(b"somebody else's")
    again = grow(store, 3, FakeSampler(rejects=bad.__contains__))
    assert again == pool
    assert listing.read_text() == text


def test_images_without_png_signature_are_not_whole():
    whole = io.BytesIO()
    Image.new("RGB", (4, 4)).save(whole, format="PNG")
    assert pool_files.is_whole_png(whole.getvalue())
    assert not pool_files.is_whole_png(b"X" + whole.getvalue()[1:])
    assert not pool_files.is_whole_png(whole.getvalue()[:-1])
    assert not pool_files.is_whole_png(b"")


def test_a_pool_of_ten_thousand_images_is_opened_within_a_second(store):
    spec = {**SPEC, "class": "boot"}
    folder = store.folder("pools", spec)
    folder.mkdir(parents=True)
    rows = {}
    for index in range(10_000):
        name = f"{index:05d}.png"
        (folder / name).write_bytes(b"0" * 40)
        values = (name, "boot", "a boot", index, 1, 40, digest_of(b"0" * 40))
        rows[index] = dict(zip(pool_files.COLUMNS, map(str, values), strict=True))
    pool_files.write_listing(rows, folder)
    asked = techniques.Request(None, spec, range(10_000), None, {}, (), None)
    began = time.perf_counter()
    [pool] = pools.grow(store, [asked], FakeSampler, Batch(7, "sampling.batch_size"), 5)
    assert len(pool.images().digests()) == 10_000
    assert time.perf_counter() - began < 1


def test_a_pool_is_an_image_folder_with_metadata(store):
    pool = grow(store, 3, FakeSampler())
    with (pool.files[0].parent / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == pool_files.COLUMNS
    assert [row["file_name"] for row in rows] == [file.name for file in pool.files]
    assert {(row["class"], row["prompt"]) for row in rows} == {("bag", "a bag")}


def test_black_and_flagged_images_are_rejected(world):
    class Pipeline:
        unet = SimpleNamespace(config=SimpleNamespace(time_cond_proj_dim=None))
        device = "cpu"

        def encode_prompt(self, *_):
            return torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)

        def __call__(self, **_):
            images = [Image.new("RGB", (8, 8), (level,) * 3) for level in (0, 90, 90)]
            return SimpleNamespace(images=images, nsfw_content_detected=[False, True, False])

    sample = pools.pipeline_sampler(
        Pipeline(), world.settings.sampling, ["a bag"], [lambda some: {}]
    )
    made = sample([(0, 0), (0, 1), (0, 2)], [5, 6, 7])
    assert [image is None for image in made] == [True, True, False]


def test_the_real_pipeline_makes_the_same_images_in_any_batch(world):
    sampling = world.settings.sampling
    prompts, pipeline = ["a photo of a bag", "a photo of a trouser"], load_pipeline(world.settings)
    sample = pools.pipeline_sampler(pipeline, sampling, prompts, [lambda some: {}] * 2)
    items, seeds = [(0, 0), (0, 1), (1, 0), (1, 1)], [11, 12, 13, 14]
    together = sample(items, seeds)
    alone = [sample([item], [seed])[0] for item, seed in zip(items, seeds, strict=True)]
    for first, second in zip(together, alone, strict=True):
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 2
    assert np.abs(np.asarray(alone[0], int) - np.asarray(alone[1], int)).mean() > 1


@pytest.mark.parametrize(
    "technique",
    [
        "stable-diffusion-prompt",
        "dreambooth",
        "textual-inversion",
        "controlnet-canny",
        "controlnet-segmentation",
    ],
)
def test_every_technique_fills_a_pool_per_class(world, technique):
    made = pools.technique_pools(world, technique, 0, 2)
    assert [pool.class_name for pool in made] == list(world.data.class_names)
    assert all(image.shape == (32, 32, 3) for pool in made for image in pool.images())
    before = [content(pool) for pool in made]
    grown = pools.technique_pools(world, technique, 0, 3)
    assert [content(pool)[:2] for pool in grown] == before
    first, second = (techniques.technique_requests(world, technique, draw, 1) for draw in (0, 1))
    assert all(a.spec != b.spec for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("technique", ["dreambooth", "textual-inversion"])
def test_personalisation_sees_nothing_outside_the_draws_subset(world, technique):
    train = world.data.splits["train"]
    for draw in (0, 1):
        subset = datasets.subset(train.labels, 10, draw)
        allowed = set(images.digests(train.images(subset)))
        requests = techniques.technique_requests(world, technique, draw, 1)
        seen = {digest for request in requests for digest in request.model["inputs"]}
        assert seen <= allowed
        assert len(seen) == 4


def test_control_images_come_from_the_subset_and_percentages_share_images(world):
    train = world.data.splits["train"]
    made = {
        percent: pools.technique_pools(world, "controlnet-canny", 0, 5, percent)
        for percent in (100, 10)
    }
    for percent, of_classes in made.items():
        inside = set(datasets.subset(train.labels, percent, 0))
        for label, pool in enumerate(of_classes):
            assert set(pool.source_rows) <= inside
            assert {train.labels[row] for row in pool.source_rows} == {label}
            assert len(set(pool.seeds)) == 5
    few, all_of_them = made[10][0], made[100][0]
    assert few.source_rows == (few.source_rows[0], few.source_rows[1]) * 2 + (few.source_rows[0],)
    assert few.files[:2] == all_of_them.files[:2]
    assert not set(few.files[2:]) & set(all_of_them.files)


def test_images_follow_their_control(world):
    settings = world.settings.controlnet.model_copy(
        update={"num_inference_steps": 6, "guidance_scale": 1.5, "scheduler": "dpmsolver++-karras"}
    )
    settings = world.settings.model_copy(update={"controlnet": settings})
    study = type(world)(world.profile, settings, world.data, world.store)
    train = world.data.splits["train"]
    [pool, _] = pools.technique_pools(study, "controlnet-segmentation", 0, 6)

    def overlap(image, row):
        first, second = control.silhouette(image), control.silhouette(train.load(row))
        return (first & second).sum() / (first | second).sum()

    own = [overlap(*pair) for pair in zip(pool.images(), pool.source_rows, strict=True)]
    assert np.mean(own) > 0.8


@pytest.mark.parametrize("name", registered())
@pytest.mark.parametrize("profile", ["smoke", "miniature"])
def test_an_image_does_not_depend_on_its_company_nor_on_kills(profile, name, tmp_path, monkeypatch):
    """Grown by 1, 3, 10 and 36, killed in between, alone, or 50 at once, beside another class."""
    opened = open_study(profile)
    changes = {
        section: getattr(opened.settings, section).model_copy(update={"max_train_steps": 3})
        for section in ("dreambooth", "dreambooth_lora", "datadream", "textual_inversion")
    }
    settings = opened.settings.model_copy(update=changes)
    grown, whole = (
        Study(profile, settings, opened.data, Store(tmp_path / store)) for store in ("a", "b")
    )
    requests = techniques.technique_requests(whole, name, 0, 50)[:2]
    together = pools.fill(whole, requests)[0]

    passes = itertools.count(1)

    def killed_now_and_then(make_sampler, *arguments):
        sampler = make_sampler(*arguments)

        def sample(indices, seeds):
            if next(passes) % 3 == 0:
                raise KeyboardInterrupt
            return sampler(indices, seeds)

        return sample

    for kind in ("pipeline_sampler", "found_sampler"):
        killed = partial(killed_now_and_then, getattr(pools, kind))
        monkeypatch.setattr(pools, kind, killed)
    kills = 0
    for count in (1, 4, 14, 50):
        request, done = dataclasses.replace(requests[0], indices=requests[0].indices[:count]), None
        while not done:
            try:
                [done] = pools.fill(grown, [request])
            except KeyboardInterrupt:
                kills += 1
    assert kills
    assert content(done) == content(together)


def test_subjects_learnt_in_parts_are_those_learnt_together(world, tmp_path):
    inversion = world.settings.textual_inversion.model_copy(update={"subjects_at_once": 1})
    settings = world.settings.model_copy(update={"textual_inversion": inversion})
    parts = type(world)(world.profile, settings, world.data, type(world.store)(tmp_path / "other"))
    made = [pools.technique_pools(study, "textual-inversion", 0, 1) for study in (world, parts)]
    for first, second in zip(*made, strict=True):
        assert first.files[0].parent.name == second.files[0].parent.name
        images = [np.asarray(pool.images()[0], int) for pool in (first, second)]
        assert np.abs(images[0] - images[1]).max() <= 2


def test_models_are_shared_by_what_they_learn_from(world):
    seen, dreambooth = world.data.splits["train"].images([0, 1]), registered()["dreambooth"]
    prompt = "A photo of a {}"
    first, second = (
        techniques.request(world, dreambooth, name, prompt, range(2), inputs=seen)
        for name in ("one", "other")
    )
    assert first.model == second.model
    assert first.spec["prompt"] == "A photo of a <funny-ret>"
    other = techniques.request(world, dreambooth, "one", prompt, range(2), inputs=seen[:1])
    assert other.model != first.model
