"""Memory and time of the thesis's largest setting: 3,680 real and 37,000 synthetic images.

    python benchmarks/full_scale.py               writes benchmarks/results/full-scale.json
    python benchmarks/full_scale.py segmented     one of its measurements

Images of 224 px are generated as files: real ones as JPEG with a trimap, synthetic ones as the
pools of 37 classes. Measured, each in a process of its own, for all of them and a tenth: opening
the pools when everything is made, features, one epoch of the published protocol, 20 updates of a
segmenter. EfficientNet-Lite0, whose weights need no download, stands in for the thesis's backbones.
Memory should grow with what has to be known of each image, not with the images.
"""

import csv
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from machine import describe
from PIL import Image

from sdaug_utils import params
from sdaug_utils.compute import peak_memory
from sdaug_utils.data.images import Dataset, Split, read_rgb
from sdaug_utils.generation.pool_files import COLUMNS, Pool, images_of
from sdaug_utils.generation.pools import fill
from sdaug_utils.generation.technique import technique_requests
from sdaug_utils.store import Store, digest_of, write_spec
from sdaug_utils.study import Study
from sdaug_utils.training import classifier, segmenter
from sdaug_utils.training.features import image_features

RESULT = Path(__file__).parent / "results" / "full-scale.json"
CLASSES, REAL, SYNTHETIC, SIDE = 37, 3680, 37000, 224
HELD_OUT = 64  # images to validate and to test on: they do not matter here
TECHNIQUE = "stable-diffusion-prompt"


def picture(number: int) -> Image.Image:
    """A smooth picture of its own for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def study_of(folder: Path, real: int) -> Study:
    """The thesis profile on the generated real images, with a store beside them."""
    settings = params.load_settings("thesis")
    on_cpu = {"foundation": "miniature", "device": "cpu", "precision": "float32"}
    own = {"backbone": "efficientnet-lite0"}
    settings = settings.model_copy(
        update={
            **on_cpu,
            "classifier": settings.classifier.model_copy(update=own),
            "segmenter": settings.segmenter.model_copy(update=own),
        }
    )

    def split(name: str, count: int) -> Split:
        return Split(
            load=lambda i: read_rgb(folder / "real" / f"{i}.jpg"),
            labels=np.arange(count) % CLASSES,
            trimap=lambda i: np.asarray(Image.open(folder / "trimaps" / f"{i}.png")),
            digest=lambda i: f"{i:020d}",
            name=f"generated, {name}",
        )

    counts = {"train": real, "validation": HELD_OUT, "test": HELD_OUT}
    names = tuple(f"class {number:02d}" for number in range(CLASSES))
    splits = {name: split(name, count) for name, count in counts.items()}
    return Study("thesis", settings, Dataset("generated", names, splits), Store(folder / "store"))


def pools_of(study: Study, synthetic: int) -> list[Pool]:
    """The pools as they are opened when everything is made."""
    return fill(study, technique_requests(study, TECHNIQUE, 0, synthetic // CLASSES))


def write_files(folder: Path) -> None:
    """All images, and the listings of the pools."""
    study = study_of(folder, REAL)
    (folder / "real").mkdir()
    (folder / "trimaps").mkdir()
    for number in range(REAL):
        image = picture(number)
        image.save(folder / "real" / f"{number}.jpg", quality=90)
        labels = np.asarray(image.convert("L")) // 86 + 1
        Image.fromarray(labels.astype(np.uint8)).save(folder / "trimaps" / f"{number}.png")
    per_class = SYNTHETIC // CLASSES
    for place, request in enumerate(technique_requests(study, TECHNIQUE, 0, per_class)):
        pool = study.store.folder("pools", request.spec)
        pool.mkdir(parents=True)
        write_spec(pool, request.spec)
        with (pool / "metadata.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for index in range(per_class):
                path = pool / f"{index:05d}.png"
                picture(REAL + place * per_class + index).save(path, compress_level=1)
                content, spec = path.read_bytes(), request.spec
                facts = (spec["class"], spec["prompt"], index, 1, len(content), digest_of(content))
                writer.writerow((path.name, *facts))


def opened(folder: Path, real: int, synthetic: int) -> None:
    pools_of(study_of(folder, real), synthetic)


def features(folder: Path, real: int, synthetic: int) -> None:
    study = study_of(folder, real)
    image_features(
        study, study.data.splits["train"].images() + images_of(pools_of(study, synthetic))
    )


def published(folder: Path, real: int, synthetic: int) -> None:
    study = study_of(folder, real)
    train, test = study.data.splits["train"], study.data.splits["test"]
    images = train.images() + images_of(pools_of(study, synthetic))
    recipe = study.settings.classifier.published.model_copy(update={"max_epochs": 1})
    labels = np.arange(len(images)) % CLASSES
    held_out = (test.images(), test.labels)
    classifier.train_published(
        *(images, labels, held_out, test.images(), "efficientnet-lite0", "none", recipe),
        seed=0,
        num_classes=CLASSES,
    )


def segmented(folder: Path, real: int, synthetic: int) -> None:
    study = study_of(folder, real)
    train = study.data.splits["train"]
    images = train.images() + images_of(pools_of(study, synthetic))
    maps = segmenter.FeatureMaps(study)
    few = {"max_train_steps": 20, "validation_steps": 20}
    maps.settings = study.settings.segmenter.model_copy(update=few)
    trimaps = [train.trimap(row) for row in range(real)]
    which = [row % real for row in range(len(images))]  # synthetic images share a real one's
    segmenter.train(maps, images, trimaps, study.data.splits, "controlled", 0, which)


def measured(work: Callable[[], None]) -> dict[str, float]:
    """Seconds of a piece of work, and the peak of this process's memory."""
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return {"seconds": float(f"{seconds:.3g}"), "peak memory GiB": round(peak_memory(), 2)}


def main() -> None:
    spawn, found = multiprocessing.get_context("spawn"), dict[str, dict[str, dict[str, float]]]()
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as alone,
    ):
        folder = Path(scratch)
        alone.submit(write_files, folder).result()
        every = (opened, features, published, segmented)
        for work in [work for work in every if work.__name__ in sys.argv[1:] or not sys.argv[1:]]:
            found[work.__name__] = {}
            for share in (10, 1):
                real, synthetic = REAL // share, SYNTHETIC // share
                task = partial(work, folder, real, synthetic)
                name = f"{real} real, {synthetic} synthetic"
                found[work.__name__][name] = alone.submit(measured, task).result()
                print(f"{work.__name__:<10} {name:<28} {found[work.__name__][name]}", flush=True)
    earlier = json.loads(RESULT.read_text())["measured"] if RESULT.exists() else {}
    result = {"machine": describe(), "image size": SIDE, "measured": earlier | found}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
