"""Measure the miniature's quality on the study's real images; numbers for the model card.

    python miniature/measure.py

Writes ``quality.json`` and ``samples.png`` beside this file. Accuracy is that of a linear head on
the study's frozen classifier, under the controlled protocol, over five seeds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from captions import ATTRIBUTES, measure
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from make_data import read_idx
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sdaug_utils.data.control import canny, segmentation_map, silhouette, trimap
from sdaug_utils.data.datasets import pad_to_rgb
from sdaug_utils.evidence import figures
from sdaug_utils.generation.foundation import load_pipeline
from sdaug_utils.generation.pools import pipeline_sampler
from sdaug_utils.study import Study, open_study
from sdaug_utils.training.classifier import TrainingSet, train_controlled
from sdaug_utils.training.features import image_features

SEEDS = range(5)
PROMPT_SEED = 10**6


def generate(pipeline: StableDiffusionPipeline, study: Study, count: int) -> list[np.ndarray]:
    """``count`` images of each class by the thesis's prompt, ordered by class."""
    images: list[np.ndarray] = []
    for label, class_name in enumerate(study.data.class_names):
        prompt = study.settings.sampling.prompt.format(class_name)
        sample = pipeline_sampler(pipeline, prompt, study.settings.sampling)
        seeds = [PROMPT_SEED * (label + 1) + index for index in range(count)]
        for start in range(0, count, 50):
            made = sample(range(start, start + 50), seeds[start : start + 50])
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


def pixel_accuracy(
    images: list[np.ndarray], labels: np.ndarray, test: list[np.ndarray], test_labels: np.ndarray
) -> float:
    """Test accuracy of logistic regression on grey pixels: a judge that no training ever saw."""
    inputs, test_inputs = (
        np.stack([image.mean(axis=2).ravel() / 255 for image in some]) for some in (images, test)
    )
    classifier = LogisticRegression(C=0.1, max_iter=500).fit(inputs, labels)
    return float(classifier.score(test_inputs, test_labels))


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


def nearest_distances(images: list[np.ndarray], corpus: Tensor) -> np.ndarray:
    """Root mean square distance (grey levels, 0 to 255) to the nearest image of the corpus."""
    grey = torch.from_numpy(np.stack([image.mean(axis=2) for image in images])).float().flatten(1)
    nearest = [torch.cdist(part, corpus).min(dim=1).values for part in grey.split(100)]
    return (torch.cat(nearest) / grey.shape[1] ** 0.5).numpy()


def quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"{q}%": round(float(np.quantile(values, q / 100)), 2) for q in (1, 10, 50, 90)}


def control_obedience(
    pipeline: StableDiffusionPipeline, weights: Path, study: Study, kind: str
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
        weights / f"controlnet-{kind}", dtype=torch.float32
    )
    controlled = StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=controlnet, requires_safety_checker=False
    )
    controlled.set_progress_bar_config(disable=True)
    settings, prompt = study.settings.controlnet, study.settings.sampling.prompt
    report, sheets = {}, []
    for name, scale in (("with", 1.0), ("without", 0.0)):
        results = []
        for start in range(0, len(rows), 50):
            part = slice(start, start + 50)
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
    figures.save_sheet(sheet, Path(__file__).parent / f"controlnet-{kind}.png")
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
                sample = pipeline_sampler(pipeline, prompt, study.settings.sampling)
                images = sample(range(20), range(20))
                measures.append([measure(np.asarray(i))[position] if i else np.nan for i in images])
            wins.append(np.array(measures[1]) > np.array(measures[0]))
        report[f"{upper} above {lower}"] = round(float(np.mean(wins)), 3)
    return report


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=here / "weights")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--quick", action="store_true", help="accuracy only")
    arguments = parser.parse_args()

    study = open_study("miniature")
    settings = study.settings
    if arguments.weights != here / "weights":
        settings = settings.model_copy(update={"foundation": str(arguments.weights)})
    pipeline = load_pipeline(settings)
    train, test = study.data.splits["train"], study.data.splits["test"]
    generated = generate(pipeline, study, 100)
    reals, tests = list(train.images()), list(test.images())
    passed = through_vae(pipeline, tests)
    trials = {
        "100 real per class": (reals, tests),
        "100 generated per class": (generated, tests),
        "100 real per class, test images through the VAE": (reals, passed),
    }
    quality: dict[str, Any] = {
        "accuracy, linear head on the study's backbone": {
            name: round(head_accuracy(study, images, train.labels, held), 4)
            for name, (images, held) in trials.items()
        },
        "accuracy, logistic regression on pixels": {
            name: round(pixel_accuracy(images, train.labels, held, test.labels), 4)
            for name, (images, held) in trials.items()
        },
    }
    rows = {}
    for label, class_name in enumerate(study.data.class_names):
        first = 100 * label
        rows[f"{class_name}, real"] = reals[first : first + 12]
        rows[f"{class_name}, made"] = generated[first : first + 12]
    figures.save_sheet(rows, here / "samples.png")
    if not arguments.quick:
        garments = read_idx(arguments.source / "train-images-idx3-ubyte")
        corpus = (
            torch.from_numpy(np.stack([pad_to_rgb(image)[..., 0] for image in garments]))
            .float()
            .flatten(1)
        )
        quality["distance to the nearest image of the corpus"] = {
            "generated": quantiles(nearest_distances(generated, corpus)),
            "real": quantiles(nearest_distances(reals, corpus)),
            "real, through the VAE": quantiles(
                nearest_distances(through_vae(pipeline, reals), corpus)
            ),
        }
        quality["attributes obeyed"] = attribute_obedience(pipeline, study)
        quality["Canny edges, F1"] = control_obedience(pipeline, arguments.weights, study, "canny")
        quality["silhouette, IoU"] = control_obedience(
            pipeline, arguments.weights, study, "segmentation"
        )
    text = json.dumps(quality, indent=2)
    print(text)
    if not arguments.quick:
        (here / "quality.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
