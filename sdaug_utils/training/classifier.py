"""The classifier: a frozen backbone with a new linear head, trained in one of three ways.

``controlled``: backbone in evaluation mode, so features are computed once per image and view and
kept; the same number of updates for every arm; best validation weights.
``published``: as the thesis's code did it, quirks included.
``pixels``: as ``controlled``, on grey pixels in place of features: no network at all.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdaug_utils.data import augment
from sdaug_utils.lazy import torch
from sdaug_utils.params import Augmentation, Controlled, Published
from sdaug_utils.training.features import FEATURE_BATCH, Arrays, load_backbone, to_pixels

CODE_VERSION = 3
KEPT_BYTES = 2**30  # of resized images, in memory
UPDATES_AT_ONCE = 10  # whose features are gathered together: more do not fit into the cache


@dataclass(frozen=True)
class Outcome:
    """What came of one training run."""

    predictions: np.ndarray  # (n_test,) class predicted for each test image
    validation_score: float  # of the weights that made the predictions
    num_updates: int
    selected_step: int  # the update after which those weights were taken
    confidences: np.ndarray | None = None  # (n_test,) softmax of the class predicted
    curve: Sequence[tuple[int, float]] = ()  # validation accuracy by number of updates


def new_head(num_features: int, num_classes: int, seed: int) -> torch.nn.Linear:
    """A linear layer with PyTorch's initial weights, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.utils.skip_init(torch.nn.Linear, num_features, num_classes)
    torch.nn.init.kaiming_uniform_(head.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(num_features)
    torch.nn.init.uniform_(head.bias, -bound, bound, generator=generator)
    return head


def batches(num_images: int, batch_size: int, num_updates: int, seed: int) -> torch.Tensor:
    """Which images each update sees: (num_updates, batch_size), reshuffled every epoch."""
    rng = np.random.default_rng(seed)
    epochs = -(-num_updates * batch_size // num_images)
    order = np.concatenate([rng.permutation(num_images) for _ in range(epochs)])
    return torch.from_numpy(order[: num_updates * batch_size]).view(num_updates, batch_size)


@dataclass(frozen=True)
class TrainingSet:
    """What one head learns from, on cached features."""

    features: torch.Tensor  # (n, views, features); whenever an image comes up, a view is drawn
    labels: torch.Tensor  # (n,), or mixed: (n, classes) or (n, views, classes) shares of each class
    seed: int  # of the head's first weights, of the order of images, of the views
    num_views: torch.Tensor | None = None  # (n,) where they differ: features are (views, features)


def train_head(
    data: TrainingSet,
    settings: Controlled,
    num_classes: int,
    every: int,
    evaluate: Callable[[int, torch.nn.Linear], object],
) -> int:
    """As :func:`train_heads`, for one head."""
    return train_heads(
        [data], settings, num_classes, every, lambda step, heads: evaluate(step, heads[0])
    )


def train_heads(
    sets: Sequence[TrainingSet],
    settings: Controlled,
    num_classes: int,
    every: int,
    evaluate: Callable[[int, Sequence[torch.nn.Linear]], object],
) -> int:
    """Train linear heads side by side, by SGD; return the number of updates of each.

    The gradient of softmax cross-entropy is written out, and heads share batched products: at this
    size autograd and an optimiser object cost several times what the arithmetic does, and a study
    trains thousands of heads. What a head learns does not depend on those beside it.
    ``evaluate(step, heads)`` is called after every ``every`` updates.
    """
    drawn = [_drawn(data, settings, num_classes) for data in sets]
    num_features = drawn[0][0].shape[1]
    heads = [new_head(num_features, num_classes, data.seed) for data in sets]
    weight = torch.stack([head.weight.detach() for head in heads])  # (heads, classes, features)
    bias = torch.stack([head.bias.detach() for head in heads])  # (heads, classes)
    for number, head in enumerate(heads):  # from now on they see what is learnt
        head.weight.data, head.bias.data = weight[number], bias[number]
    rate, step = settings.learning_rate / settings.batch_size, 0
    inputs, wanted = (  # of the next updates
        torch.empty(len(sets), UPDATES_AT_ONCE * settings.batch_size, width)
        for width in (num_features, num_classes)
    )
    with torch.no_grad():
        for part in range(len(drawn[0][2])):
            for number, (vectors, targets, rows, rows_of_targets) in enumerate(drawn):
                count = len(rows[part])  # less than all at the end
                torch.index_select(vectors, 0, rows[part], out=inputs[number, :count])
                torch.index_select(targets, 0, rows_of_targets[part], out=wanted[number, :count])
            both = (x[:, :count].unflatten(1, (-1, settings.batch_size)) for x in (inputs, wanted))
            # (heads, updates, batch, width): one update after the other.
            for x, target in zip(*(each.unbind(1) for each in both), strict=True):
                error = torch.baddbmm(bias[:, None], x, weight.mT).softmax(dim=2).sub_(target)
                weight.baddbmm_(error.mT, x, alpha=-rate)
                bias.sub_(error.sum(dim=1), alpha=rate)
                step += 1
                if step % every == 0 or step == settings.max_train_steps:
                    evaluate(step, heads)
    return step


def _drawn(
    data: TrainingSet, settings: Controlled, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """All vectors and targets, and the rows of each that the updates see, in parts.

    Where an image has fewer views than others, they are repeated in turn.
    """
    targets, counts, width = data.labels, data.num_views, data.features.shape[-1]
    if counts is None:
        counts = torch.full(data.features.shape[:1], data.features.shape[1])
    if targets.ndim == 1:
        targets = torch.nn.functional.one_hot(targets, num_classes).float()
    images = batches(len(counts), settings.batch_size, settings.max_train_steps, data.seed)
    generator = torch.Generator().manual_seed(data.seed)
    views = torch.randint(int(counts.max()), images.shape, generator=generator) % counts[images]
    rows = (counts.cumsum(0) - counts)[images] + views  # an image's first row, and the view
    rows_of_targets = rows if targets.ndim == 3 else images
    parts = (
        x.flatten().split(UPDATES_AT_ONCE * settings.batch_size) for x in (rows, rows_of_targets)
    )
    return data.features.reshape(-1, width), targets.reshape(-1, num_classes), *parts


def train_reference_head(
    data: TrainingSet, settings: Controlled, num_classes: int
) -> torch.nn.Linear:
    """A head trained on some images alone: nothing else decides when it is good."""
    heads: list[torch.nn.Linear] = []
    last = settings.max_train_steps
    train_head(data, settings, num_classes, last, lambda _, head: heads.append(head))
    return heads[0]


def accuracy(head: torch.nn.Module, features: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images that a head puts in the right class."""
    return (head(features).argmax(dim=1) == labels).double().mean().item()


def train_controlled(
    sets: Sequence[TrainingSet],
    validation: tuple[torch.Tensor, np.ndarray],
    test_features: torch.Tensor,
    settings: Controlled,
    num_classes: int,
) -> list[Outcome]:
    """Equal updates for every arm; the weights best on validation make the predictions."""
    best = [Outcome(np.empty(0), -1.0, 0, 0)] * len(sets)
    curves: list[list[tuple[int, float]]] = [[] for _ in sets]
    labels = torch.from_numpy(validation[1])

    def evaluate(step: int, heads: Sequence[torch.nn.Linear]) -> None:
        for number, head in enumerate(heads):
            score = accuracy(head, validation[0], labels)
            curves[number].append((step, score))
            if score > best[number].validation_score:
                logits = head(test_features)
                predictions, sure = logits.argmax(dim=1), logits.softmax(dim=1).amax(dim=1)
                best[number] = Outcome(predictions.numpy(), score, step, step, sure.numpy())

    every = min(settings.validation_steps, settings.max_train_steps)
    updates = train_heads(sets, settings, num_classes, every, evaluate)
    pairs = zip(best, curves, strict=True)
    return [replace(outcome, num_updates=updates, curve=curve) for outcome, curve in pairs]


def train_published(
    images: Arrays,
    labels: np.ndarray,
    validation: tuple[Arrays, np.ndarray],
    test_images: Arrays,
    backbone_name: str,
    augmentation: Augmentation,
    settings: Published,
    seed: int,
    num_classes: int,
    device: torch.device | str = "cpu",
) -> Outcome:
    """As in the thesis's code: frozen weights, but a network in train mode.

    BatchNorm normalises by each batch and its running statistics drift; pixels in 0 to 1 without
    ImageNet normalisation; SGD without momentum; early stopping on validation accuracy; the last
    epoch's weights make the predictions. An epoch is ``passes_per_epoch`` passes over the images:
    one in the thesis, more where data are fewer, so that its epochs have as many updates as there.
    """
    backbone = copy.deepcopy(load_backbone(backbone_name)).to(device)
    head = new_head(backbone.num_features, num_classes, seed).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(head.parameters(), lr=settings.learning_rate)
    transform = augment.build(augmentation, settings.image_size)
    resize = augment.build("none", settings.image_size)
    targets = torch.from_numpy(labels).to(device)

    def resized(some: Arrays) -> Arrays:  # if they fit into memory
        num_bytes = len(some) * 3 * settings.image_size**2
        return _views(some, resize) if num_bytes <= KEPT_BYTES else some

    @torch.inference_mode()
    def predict(some: Arrays) -> np.ndarray:
        backbone.eval()
        parts = [some[i : i + FEATURE_BATCH] for i in range(0, len(some), FEATURE_BATCH)]
        logits = [head(backbone(to_pixels(_views(part, resize)).to(device))) for part in parts]
        return torch.cat(logits).argmax(dim=1).cpu().numpy()

    kept = resized(images) if augmentation == "none" else images
    validation_images = resized(validation[0])
    best, best_epoch, updates, curve = -1.0, 0, 0, list[tuple[int, float]]()
    for epoch in range(settings.max_epochs):
        backbone.train()
        for rows, first_seed in _epoch(len(images), settings, seed, epoch):
            batch = _views([kept[row] for row in rows], transform, first_seed)
            with torch.no_grad():
                features = backbone(to_pixels(batch).to(device))
            loss = torch.nn.functional.cross_entropy(head(features), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
        score = float((predict(validation_images) == validation[1]).mean())
        curve.append((updates, score))
        if score > best:
            best, best_epoch = score, epoch
        elif epoch - best_epoch >= settings.patience:
            break
    return Outcome(predict(test_images), score, updates, updates, curve=curve)


def _views(images: Arrays, transform: augment.Transform, seed: int = 0) -> list[np.ndarray]:
    """A view of each image, by seeds that count up."""
    return [augment.view(image, transform, seed + place) for place, image in enumerate(images)]


def _epoch(
    num_images: int, settings: Published, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of each batch of an epoch, and the seed of its first image's view."""
    passes = settings.passes_per_epoch
    for number in range(epoch * passes, (epoch + 1) * passes):
        order = np.random.default_rng((seed, number)).permutation(num_images)
        for start in range(0, num_images, settings.batch_size):
            rows = order[start : start + settings.batch_size]
            yield rows, (seed * 1000 + number) * 10**6 + start
