"""The segmenter: a DeepLabV3 head (Chen et al., 2017) on the frozen backbone.

The backbone is in evaluation mode, so its feature maps are computed once per image; the head is
trained on them. Labels are trimaps: 1 subject, 2 background, 3 border.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import cv2
import numpy as np

from sdaug_utils.compute import device_of, one_thread
from sdaug_utils.data import augment
from sdaug_utils.data.images import Images, Split
from sdaug_utils.lazy import torch
from sdaug_utils.params import Protocol, Segmenter
from sdaug_utils.study import Study
from sdaug_utils.training.classifier import batches
from sdaug_utils.training.features import FEATURE_BATCH, folded_backbone, normalise, pad, to_pixels

CODE_VERSION = 5
NUM_CLASSES = 3
MapsOf = Callable[[Sequence[int]], Any]  # (n, channels, height, width) of some images, by row


@dataclass(frozen=True)
class Segmented:
    """What came of one training run."""

    weighted_jaccard: np.ndarray  # (n_test,) of each test image, in 0 to 1
    mean_iou: np.ndarray  # (n_test,)
    labels: np.ndarray  # (n_test, height, width) predicted, 1 subject, 2 background, 3 border
    validation_score: float  # the weighted Jaccard index, though the loss chooses
    num_updates: int
    selected_step: int
    curve: Sequence[tuple[int, float]]  # validation loss by number of updates


class FeatureMaps:
    """Feature maps of 8-bit RGB images under the frozen backbone, kept in memory if small."""

    def __init__(self, study: Study) -> None:
        self.study, self.settings = study, study.settings.segmenter
        self.device = device_of(study.settings)
        self.known: dict[str, torch.Tensor] = {}
        self.held_out = cache(self._held_out)  # of a split

    def of(self, images: Images) -> MapsOf:
        """A function of rows that returns their images' maps: (n, channels, height, width).

        Maps are 32-bit floats; those that are kept are computed at once, as 16-bit floats.
        """
        if not self.settings.keep_features:
            return lambda rows: self._maps([images[row] for row in rows]).float()
        keys = images.digests()
        missing = {key: row for row, key in enumerate(keys) if key not in self.known}
        with one_thread(self.study.settings):
            for start in range(0, len(missing), FEATURE_BATCH):
                part = list(missing)[start : start + FEATURE_BATCH]
                maps = self._maps(pad([images[missing[key]] for key in part]))
                self.known.update(zip(part, maps.half().cpu().contiguous(), strict=False))
        every = torch.stack([self.known[key] for key in keys])
        return lambda rows: every[list(rows)].to(self.device).float()

    def _held_out(self, split: Split) -> tuple[MapsOf, torch.Tensor]:
        """Maps of a split's images, and its labels as :func:`_targets` gives them."""
        trimaps = [split.trimap(i) for i in range(len(split))]
        return self.of(split.images()), _targets(trimaps, self.settings.label_size)

    def _maps(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        resize = augment.build("none", self.settings.image_size)
        views = [augment.view(image, resize, 0) for image in images]
        backbone: Any = folded_backbone(self.settings.backbone, self.settings.output_stride)
        inputs = normalise(to_pixels(views).to(self.device), backbone.to(self.device))
        with torch.no_grad():
            if self.settings.backbone == "deeplabv3-resnet101":
                return backbone(inputs)["out"]
            return backbone.forward_intermediates(
                inputs, indices=[self.settings.stage], intermediates_only=True, stop_early=True
            )[0]


def new_head(num_features: int, settings: Segmenter) -> torch.nn.Sequential:
    """torchvision's ``DeepLabHead`` with a choice of width and dropout, which is 0.5 there.

    It maps (n, features, height, width) to (n, 3, height, width).
    """
    from torchvision.models.segmentation.deeplabv3 import ASPP

    channels = settings.channels
    pyramid = ASPP(num_features, settings.atrous_rates, channels)
    pyramid.project[-1].p = settings.dropout
    return torch.nn.Sequential(
        pyramid,
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
    which: Sequence[int] | None = None,
) -> Segmented:
    """Train a head by Adam; the validation loss chooses the weights, or when to stop.

    ``controlled``: a fixed number of updates at a rate that falls to nothing along half a cosine
    (Loshchilov & Hutter, 2017), the best weights are tested. ``published``: a constant rate,
    validation after each epoch, an end after ``patience`` epochs without improvement, the last
    weights are tested (thesis, section 4.2.2).
    Trimaps are arrays (height, width) of labels 1 to 3, brought to one size by nearest neighbour;
    ``which`` says which of them each image has: by default each has its own. Of the ``splits``,
    ``validation`` and ``test`` are used.
    """
    settings, device, side = maps.settings, maps.device, maps.settings.label_size
    targets = _targets(trimaps, side)
    of_image = torch.as_tensor(range(len(images)) if which is None else which)
    held_out = {name: maps.held_out(splits[name]) for name in ("validation", "test")}
    controlled, epoch = protocol == "controlled", -(-len(images) // settings.batch_size)
    last = settings.max_train_steps if controlled else settings.max_epochs * epoch
    every = settings.validation_steps if controlled else epoch
    features = maps.of(images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = new_head(features([0]).shape[1], settings).to(device)
    _seed_dropout(head, torch.Generator(device).manual_seed(seed))
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.learning_rate, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, last) if controlled else None
    best_loss, best_step, best = float("inf"), 0, copy.deepcopy(head.state_dict())
    step, curve = 0, list[tuple[int, float]]()
    for step, rows in enumerate(batches(len(images), settings.batch_size, last, seed), 1):
        head.train()
        logits = _upsampled(head, features(rows.tolist()), side)
        wanted = targets[of_image[rows]].to(device)
        loss = torch.nn.functional.cross_entropy(logits, wanted.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if decay:
            decay.step()
        if step % every == 0 or step == last:
            lost = _loss(head, *held_out["validation"])
            curve.append((step, lost))
            if lost < best_loss:
                best_loss, best_step, best = lost, step, copy.deepcopy(head.state_dict())
            elif not controlled and step - best_step >= settings.patience * epoch:
                break
    if controlled:
        head.load_state_dict(best)
    chosen = best_step if controlled else step
    found = {name: predict(head, *pair) for name, pair in held_out.items()}
    validation, test = (jaccard(found[x], held_out[x][1].numpy(), NUM_CLASSES) for x in held_out)
    score = float(validation[0].mean())
    return Segmented(*test, found["test"] + 1, score, step, chosen, curve)


def _seed_dropout(head: torch.nn.Module, generator: torch.Generator) -> None:
    """Let dropout draw from a generator of its own: heads may learn at the same time."""

    def dropped(module: torch.nn.Dropout, x: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return x
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= module.p
        return x * kept / (1 - module.p)

    for module in head.modules():
        if isinstance(module, torch.nn.Dropout):
            module.forward = partial(dropped, module)  # type: ignore[method-assign]


def _targets(trimaps: Sequence[np.ndarray], side: int) -> torch.Tensor:
    """Labels 0 to 2 of each pixel, 8 bit: (n, side, side)."""
    nearest = cv2.INTER_NEAREST
    resized = [cv2.resize(trimap, (side, side), interpolation=nearest) for trimap in trimaps]
    return torch.from_numpy(np.stack(resized).astype(np.uint8) - 1)


def _upsampled(head: torch.nn.Module, features: torch.Tensor, side: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(head(features), size=[side, side], mode="bilinear")


def _logits(
    head: torch.nn.Module, features: MapsOf, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of a head in evaluation mode and the targets, some images at a time."""
    head.eval()
    with torch.no_grad():
        for rows in torch.arange(len(targets)).split(FEATURE_BATCH):
            yield _upsampled(head, features(rows.tolist()), targets.shape[-1]), targets[rows]


def _loss(head: torch.nn.Module, features: MapsOf, targets: torch.Tensor) -> float:
    total = 0.0
    for logits, wanted in _logits(head, features, targets):
        there = wanted.to(logits.device).long()
        total += torch.nn.functional.cross_entropy(logits, there, reduction="sum").item()
    return total / targets.numel()


def predict(head: torch.nn.Module, features: MapsOf, targets: torch.Tensor) -> np.ndarray:
    """Labels 0 to 2 of each pixel: (n, side, side)."""
    every = _logits(head, features, targets)
    labels = [logits.max(dim=1).indices.cpu().byte() for logits, _ in every]  # argmax is slower
    return torch.cat(labels).numpy()


def jaccard(
    predicted: np.ndarray, truth: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard index (intersection over union) of each of n label images (n, height, width).

    Returns (n,) averaged over classes, weighted by how many pixels of the truth are theirs (thesis,
    section 4.2.4), and (n,) averaged over the classes that occur, unweighted: mean IoU.
    """
    counts = []  # of pixels
    for label in range(num_classes):
        guessed, wanted = predicted == label, truth == label
        masks = (guessed & wanted, guessed | wanted, wanted)
        counts.append([mask.sum(axis=(1, 2)) for mask in masks])
    both, either, support = np.swapaxes(counts, 0, 1)  # (classes, n)
    index = both / np.maximum(either, 1)
    weighted = (index * support).sum(axis=0) / support.sum(axis=0)
    return weighted, index.sum(axis=0) / (either > 0).sum(axis=0)
