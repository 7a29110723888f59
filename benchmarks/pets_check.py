"""Run the thesis profile's own path on real Oxford-IIIT Pet photographs, without a GPU.

    python benchmarks/pets_check.py FOLDER    FOLDER/oxford-iiit-pet is in the official layout

Five images per breed to train on, five to test: accuracies of both protocols beside those to be
expected, classical augmentation, the segmenter; sheets of augmented views and of control images in
``runs/pets-check/``. The backbone is EfficientNet-Lite0, whose weights come with the packages. The
accuracies are written to ``sdaug_utils/evidence/tables/pets_check.csv``, which experiment 03 shows.
Exit code 1 if one is off by more than 0.06.

Then the placebo, ``pets_placebo.csv``: ten copies of each training image, not synthetic ones, added
to them, for eight splits of the ten images of each breed into five and five.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression

from sdaug_utils.data import augment, control, datasets
from sdaug_utils.data.images import Images
from sdaug_utils.errors import InputError
from sdaug_utils.evidence import figures
from sdaug_utils.evidence.claims import TABLES
from sdaug_utils.params import Augmentation, Data, load_settings
from sdaug_utils.store import Store
from sdaug_utils.study import Study
from sdaug_utils.training import classifier as training
from sdaug_utils.training import segmenter
from sdaug_utils.training.features import image_features

ROOT = Path(__file__).parents[1]
PER_CLASS = {"train": 5, "validation": 2, "test": 3}
EXPECTED = {
    "as published, 660 updates": 0.28,
    "evaluation mode, 660 updates": 0.63,
    "evaluation mode, 6,000 updates": 0.81,
    "logistic regression, to convergence": 0.84,
}
"""Of 185 test images, by a frozen EfficientNet-Lite0 at 224 px; rate 1e-3, batches of 16."""
TOLERANCE = 0.06
SEEDS = range(3)
AUGMENTATIONS: tuple[Augmentation, ...] = ("custom", "autoaugment", "randaugment")
SHOWN = 8
SPLITS = 8
THEIR_UPDATES = 3872  # of the thesis's run 035, of textual inversion: 32 epochs, by its log
COPIES = 10  # of each training image: 50 per breed, as many as the thesis's synthetic ones


def open_pets(folder: Path, store: Store) -> Study:
    """The thesis profile on five images per breed, with a backbone that needs no download."""
    settings = load_settings("thesis")
    pets = Data(
        name="oxford-iiit-pet",
        classes=None,
        max_images_per_class=PER_CLASS,
        folder=str(folder.resolve()),
    )
    classifier = settings.classifier.model_copy(update={"backbone": "efficientnet-lite0"})
    segmenting = settings.segmenter.model_copy(
        update={
            "backbone": "efficientnet-lite0",
            "keep_features": True,
            "channels": 64,
            "atrous_rates": [6, 12, 18],
            "max_train_steps": 300,
            "validation_steps": 100,
        }
    )
    data = settings.data | {"main": pets}
    settings = settings.model_copy(
        update={"data": data, "classifier": classifier, "segmenter": segmenting, "device": "cpu"}
    )
    loaded = datasets.load(**pets.model_dump(exclude={"download"}))
    return Study("thesis", settings, loaded, store)


def accuracies(study: Study) -> dict[str, float]:
    """Test accuracy of heads under both protocols, on validation and test images together."""
    splits, classifier = study.data.splits, study.settings.classifier
    train, num_classes = splits["train"], len(study.data.class_names)
    held_out = splits["validation"].images() + splits["test"].images()
    held_labels = np.concatenate([splits["validation"].labels, splits["test"].labels])
    labels, wanted = torch.from_numpy(train.labels), torch.from_numpy(held_labels)
    features = image_features(study, train.images())
    test = image_features(study, held_out)[:, 0]

    def curve(trained_on: torch.Tensor, steps: int) -> dict[int, float]:
        settings = classifier.controlled.model_copy(
            update={"learning_rate": 1e-3, "max_train_steps": steps}
        )
        scores: dict[int, list[float]] = {}
        for seed in SEEDS:
            training.train_head(
                training.TrainingSet(trained_on, labels, seed),
                settings,
                num_classes,
                60,
                lambda step, head: scores.setdefault(step, []).append(
                    training.accuracy(head, test, wanted)
                ),
            )
        return {step: float(np.mean(values)) for step, values in scores.items()}

    plain = curve(features, 6000)
    regression = LogisticRegression(max_iter=2000).fit(features[:, 0].numpy(), train.labels)
    found = {
        "evaluation mode, 660 updates": plain[660],
        "evaluation mode, 6,000 updates": plain[6000],
        "logistic regression, to convergence": float(regression.score(test.numpy(), held_labels)),
    }
    for name in AUGMENTATIONS:
        views = image_features(study, train.images(), name, 4)
        found[f"evaluation mode, 6,000 updates, {name}"] = curve(views, 6000)[6000]
    published = classifier.published.model_copy(
        update={"patience": classifier.published.max_epochs}
    )
    few = datasets.first_per_class(splits["validation"].labels, 1)
    outcome = training.train_published(
        train.images(),
        train.labels,
        (splits["validation"].images(few), splits["validation"].labels[few]),
        held_out,
        classifier.backbone,
        "none",
        published,
        0,
        num_classes,
    )
    assert outcome.num_updates == 55 * -(-len(train) // 16)
    found["as published, 660 updates"] = float((outcome.predictions == held_labels).mean())
    return found


def placebo(study: Study) -> pd.DataFrame:
    """Test accuracy with and without copies, of a frozen, normalised network, by split.

    The baseline and the copies are trained for the thesis's 55 epochs, so copies have more updates;
    once more for as many as the thesis's run had that gained most. The images of each breed are cut
    into two halves; four shuffles are used twice, with the halves exchanged, so that the training
    images of such a pair are disjoint.
    """
    splits, settings = study.data.splits, study.settings.classifier
    labels = np.concatenate([split.labels for split in splits.values()])
    images = sum((split.images() for split in splits.values()), Images(()))
    features, rows = image_features(study, images), []
    for number in range(SPLITS):
        rng, halves = np.random.default_rng(number // 2), [list[int](), list[int]()]
        for label in np.unique(labels):
            order = rng.permutation(np.flatnonzero(labels == label)).tolist()
            halves[number % 2] += order[: len(order) // 2]
            halves[1 - number % 2] += order[len(order) // 2 :]
        few, held_out = halves
        both = few * (1 + COPIES)
        arms = [
            ("baseline", few, settings.published.max_updates(len(few))),
            ("copies", both, settings.published.max_updates(len(both))),
            ("copies, fewer updates", both, THEIR_UPDATES),
        ]
        for arm, seen, updates in arms:
            recipe = settings.controlled.model_copy(
                update={
                    "learning_rate": settings.published.learning_rate,
                    "max_train_steps": updates,
                    "validation_steps": updates,
                }
            )
            given = training.TrainingSet(features[seen], torch.from_numpy(labels[seen]), number)
            head = training.train_reference_head(given, recipe, len(study.data.class_names))
            found = head(features[held_out, 0]).argmax(dim=1).numpy()
            right = float((found == labels[held_out]).mean())
            rows.append({"split": number, "arm": arm, "updates": updates, "accuracy": right})
    return pd.DataFrame(rows)


def segment(study: Study) -> dict[str, float]:
    """Weighted Jaccard index and mean IoU of the segmenter; the background's share of pixels."""
    splits = study.data.splits
    train, test = splits["train"], splits["test"]
    trimaps = [train.trimap(i) for i in range(len(train))]
    maps = segmenter.FeatureMaps(study)
    outcome = segmenter.train(maps, train.images(), trimaps, splits, "controlled", 0)
    truth = [test.trimap(i) for i in range(len(test))]
    guess = np.mean([(labels == control.BACKGROUND).mean() for labels in truth])
    return {
        "weighted Jaccard index": float(outcome.weighted_jaccard.mean()),
        "mean IoU": float(outcome.mean_iou.mean()),
        "share of background": float(guess),
    }


def save_sheets(study: Study, target: Path) -> None:
    """Augmented views at the classifier's size; control images at the sampling resolution."""
    settings, train = study.settings, study.data.splits["train"]
    rows = datasets.first_per_class(train.labels, 1)[:: max(1, 37 // SHOWN)][:SHOWN]
    size, resolution = settings.classifier.image_size, settings.sampling.resolution
    names: tuple[Augmentation, ...] = ("none", *AUGMENTATIONS)
    views: dict[str, list[np.ndarray]] = {
        name: [
            augment.view(train.load(int(row)), augment.build(name, size), int(row)) for row in rows
        ]
        for name in names
    }
    figures.save_sheet(views, target / "augmentation.png", scale=1)
    plain = augment.build("none", resolution)
    controls = {
        "image": [augment.view(train.load(int(row)), plain, 0) for row in rows],
        "Canny": [control.canny(train.load(int(row)), resolution) for row in rows],
        "palette": [
            control.segmentation_map(
                train.trimap(int(row)), resolution, settings.controlnet.palette
            )
            for row in rows
        ],
    }
    figures.save_sheet(controls, target / "controls.png", scale=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds oxford-iiit-pet/images and /annotations")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        study = open_pets(arguments.folder, Store(scratch))
        sizes = {name: len(split) for name, split in study.data.splits.items()}
        print(f"{len(study.data.class_names)} breeds, images: {sizes}")
        target = ROOT / "runs" / "pets-check"
        target.mkdir(parents=True, exist_ok=True)
        save_sheets(study, target)
        found, copies = accuracies(study), placebo(study)
        segmented = segment(study)
    copies.to_csv(TABLES / "pets_placebo.csv", index=False, float_format="%.6f")
    print(copies.groupby("arm")[["updates", "accuracy"]].mean().to_string())
    shown = pd.DataFrame([(name, f"{found[name]:.3f}") for name in EXPECTED])
    shown.to_csv(TABLES / "pets_check.csv", index=False, header=["training", "test accuracy"])
    print(f"\n{'test accuracy':<45} {'here':>6} {'expected':>9}")
    for name, value in found.items():
        expected = f"{EXPECTED[name]:>9.2f}" if name in EXPECTED else ""
        print(f"{name:<45} {value:>6.3f} {expected}")
    print(f"\n{'segmenter, 300 updates':<45}")
    for name, value in segmented.items():
        print(f"{name:<45} {value:>6.3f}")
    print(f"\nsheets: runs/pets-check; {(time.monotonic() - began) / 60:.1f} minutes")
    return int(any(abs(found[name] - value) > TOLERANCE for name, value in EXPECTED.items()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"pets_check.py: {error}")
