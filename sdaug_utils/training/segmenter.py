"""The segmenter: a DeepLabV3 head (Chen et al., 2017) on the frozen backbone.

The backbone is in evaluation mode, so its feature maps are computed once per image; the head is
trained on them. Labels are trimaps: 1 subject, 2 background, 3 border.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np

from sdaug_utils.compute import device_of
from sdaug_utils.data import augment
from sdaug_utils.data.images import Images, Split, digests
from sdaug_utils.lazy import torch
from sdaug_utils.params import Protocol
from sdaug_utils.study import Study
from sdaug_utils.training.classifier import batches
from sdaug_utils.training.features import FEATURE_BATCH, load_backbone, normalise, to_pixels

CODE_VERSION = 3
NUM_CLASSES = 3
STAGE = 3  # the backbone's third to last resolution: the deepest before its channels triple


@dataclass(frozen=True)
class Segmented:
    """What came of one training run."""

    weighted_jaccard: np.ndarray  # (n_test,) of each test image, in 0 to 1
    mean_iou: np.ndarray  # (n_test,)
    labels: np.ndarray  # (n_test, height, width) predicted, 1 subject, 2 background, 3 border
    validation_score: float
    num_updates: int
    selected_step: int


class FeatureMaps:
    """Feature maps of images under the frozen backbone, kept in memory if they are small."""

    def __init__(self, study: Study) -> None:
        self.settings = study.settings.segmenter
        self.device = device_of(study.settings)
        self.known: dict[str, torch.Tensor] = {}

    def __call__(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """(n, channels, height, width), 32-bit floats, of 8-bit RGB images of any size."""
        if not self.settings.keep_features:
            parts = range(0, len(images), FEATURE_BATCH)
            return torch.cat([self._maps(images[i : i + FEATURE_BATCH]) for i in parts]).float()
        keys = digests(images)
        missing = list({key: i for i, key in enumerate(keys) if key not in self.known}.items())
        for start in range(0, len(missing), FEATURE_BATCH):
            part = missing[start : start + FEATURE_BATCH]
            maps = self._maps([images[i] for _, i in part])
            kept = maps.half().cpu().contiguous().unbind()
            self.known.update(zip((key for key, _ in part), kept, strict=True))
        return torch.stack([self.known[key] for key in keys]).to(self.device).float()

    def _maps(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        resize = augment.build("none", self.settings.image_size)
        pixels = to_pixels([augment.view(image, resize, 0) for image in images]).to(self.device)
        backbone: Any = load_backbone(self.settings.backbone, self.settings.output_stride)
        inputs = normalise(pixels, backbone.to(self.device))
        with torch.no_grad():
            if self.settings.backbone == "deeplabv3-resnet101":
                return backbone(inputs)["out"]
            return backbone.forward_intermediates(
                inputs, indices=[STAGE], intermediates_only=True, stop_early=True
            )[0]


def new_head(num_features: int, channels: int, rates: Sequence[int]) -> torch.nn.Sequential:
    """torchvision's ``DeepLabHead`` with a choice of width: (n, features, h, w) to (n, 3, h, w)."""
    from torchvision.models.segmentation.deeplabv3 import ASPP

    return torch.nn.Sequential(
        ASPP(num_features, list(rates), channels),
        torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(channels),
        torch.nn.ReLU(),
        torch.nn.Conv2d(channels, NUM_CLASSES, 1),
    )


def train(
    maps: FeatureMaps,
    images: Images,
    trimaps: Sequence[np.ndarray],
    splits: Mapping[str, Split],
    protocol: Protocol,
    seed: int,
) -> Segmented:
    """Train a head by Adam; the validation loss decides.

    ``controlled``: a fixed number of updates, the best weights are tested. ``published``: a look
    at the validation loss after each epoch, an end after ``patience`` epochs without improvement,
    the last weights are tested (thesis, section 4.2.2).

    Args:
        images: n 8-bit RGB arrays.
        trimaps: n arrays (height, width) of labels 1 to 3; they are brought to one size by nearest
            neighbour.
        splits: ``validation`` and ``test`` are used.
    """
    settings, device = maps.settings, maps.device
    side = settings.label_size
    targets = _targets(trimaps, side)
    held_out = {name: _held_out(splits[name], side) for name in ("validation", "test")}
    epoch = -(-len(images) // settings.batch_size)
    if protocol == "controlled":
        last, every, patience = settings.max_train_steps, settings.validation_steps, None
    else:
        last, every, patience = settings.max_epochs * epoch, epoch, settings.patience
    num_features = maps(images[:1]).shape[1]  # loads the backbone, which draws random numbers, too
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = new_head(num_features, settings.channels, settings.atrous_rates).to(device)
        optimizer = torch.optim.Adam(head.parameters(), lr=settings.learning_rate)
        best_loss, best_step, best = float("inf"), 0, copy.deepcopy(head.state_dict())
        step = 0
        for step, rows in enumerate(batches(len(images), settings.batch_size, last, seed), 1):
            head.train()
            features = maps(images.taken(rows.tolist()))
            wanted = targets[rows].to(device)
            loss = torch.nn.functional.cross_entropy(_upsampled(head, features, side), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % every == 0 or step == last:
                score = _loss(head, maps, *held_out["validation"])
                if score < best_loss:
                    best_loss, best_step, best = score, step, copy.deepcopy(head.state_dict())
                elif patience and step - best_step >= patience * epoch:
                    break
    if protocol == "controlled":
        head.load_state_dict(best)
    predicted = {name: predict(head, maps, pair[0], side) for name, pair in held_out.items()}
    validation, test = (
        jaccard(predicted[name], held_out[name][1].numpy(), NUM_CLASSES)
        for name in ("validation", "test")
    )
    selected = best_step if protocol == "controlled" else step
    labels = (predicted["test"] + 1).astype(np.uint8)
    return Segmented(test[0], test[1], labels, float(validation[0].mean()), step, selected)


def _targets(trimaps: Sequence[np.ndarray], side: int) -> torch.Tensor:
    """Labels 0 to 2 of each pixel: (n, side, side)."""
    resized = [
        trimap
        if trimap.shape == (side, side)
        else cv2.resize(trimap, (side, side), interpolation=cv2.INTER_NEAREST)
        for trimap in trimaps
    ]
    return torch.from_numpy(np.stack(resized).astype(np.int64) - 1)


@cache
def _held_out(split: Split, side: int) -> tuple[Images, torch.Tensor]:
    return split.images(), _targets([split.trimap(i) for i in range(len(split))], side)


def _upsampled(head: torch.nn.Module, features: torch.Tensor, side: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(head(features), size=[side, side], mode="bilinear")


def _logits(
    head: torch.nn.Module, maps: FeatureMaps, images: Images, side: int
) -> Iterator[torch.Tensor]:
    """What a head in evaluation mode makes of images, some at a time."""
    head.eval()
    with torch.no_grad():
        for start in range(0, len(images), FEATURE_BATCH):
            yield _upsampled(head, maps(images[start : start + FEATURE_BATCH]), side)


def _loss(head: torch.nn.Module, maps: FeatureMaps, images: Images, targets: torch.Tensor) -> float:
    total = 0.0
    for logits, wanted in zip(
        _logits(head, maps, images, targets.shape[-1]), targets.split(FEATURE_BATCH), strict=True
    ):
        there = wanted.to(logits.device)
        total += torch.nn.functional.cross_entropy(logits, there, reduction="sum").item()
    return total / targets.numel()


def predict(head: torch.nn.Module, maps: FeatureMaps, images: Images, side: int) -> np.ndarray:
    """Labels 0 to 2 of each pixel: (n, side, side)."""
    parts = _logits(head, maps, images, side)
    labels = [logits.max(dim=1).indices.cpu().byte() for logits in parts]  # argmax is slower
    return torch.cat(labels).numpy()


def jaccard(
    predicted: np.ndarray, truth: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard index (intersection over union) of each of n label images (n, height, width).

    Returns:
        (n,) averaged over classes, weighted by how many pixels of the truth are theirs (thesis,
        section 4.2.4), and (n,) averaged over the classes that occur, unweighted: mean IoU.
    """
    axes = tuple(range(1, truth.ndim))
    both, either, support = (np.empty((num_classes, len(truth))) for _ in range(3))
    for label in range(num_classes):
        guessed, wanted = predicted == label, truth == label
        both[label] = (guessed & wanted).sum(axis=axes)
        either[label] = (guessed | wanted).sum(axis=axes)
        support[label] = wanted.sum(axis=axes)
    index = both / np.maximum(either, 1)
    weighted = (index * support).sum(axis=0) / support.sum(axis=0)
    return weighted, index.sum(axis=0) / (either > 0).sum(axis=0)
