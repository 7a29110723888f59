"""Draw the study's 3,500 images from Fashion-MNIST's test file and write them as PNG sheets.

    python miniature/make_data.py /usr/share/datasets/fashion-mnist

The folder holds the four idx files: Debian's package ``dataset-fashion-mnist`` puts them into
/usr/share/datasets/fashion-mnist, and ``torchvision.datasets.FashionMNIST(root, download=True)``
into ``root/FashionMNIST/raw``. One sheet per split: a row of 28x28 tiles per class. The draw is
seeded and Pillow is pinned, so the files come out bit for bit; ``SHA256SUMS`` is written beside
them and checked by ``sdaug_utils.data.datasets`` whenever they are read.
"""

import argparse
import gzip
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

SEED = 2023
IMAGES_PER_CLASS = {"train": 100, "validation": 50, "test": 200}
NUM_CLASSES = 10


def read_idx(path: Path) -> np.ndarray:
    """Read one idx file of unsigned bytes, gzipped or not (LeCun's format, as in MNIST)."""
    if not path.exists():
        path = path.with_name(path.name + ".gz")
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    num_dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", num_dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)


def draw(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Indices into the test file, shape (classes, images per class), for each split."""
    rng = np.random.default_rng(SEED)
    shuffled = [rng.permutation(np.flatnonzero(labels == label)) for label in range(NUM_CLASSES)]
    splits, start = {}, 0
    for split, count in IMAGES_PER_CLASS.items():
        splits[split] = np.stack([order[start : start + count] for order in shuffled])
        start += count
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()

    images = read_idx(arguments.source / "t10k-images-idx3-ubyte")
    labels = read_idx(arguments.source / "t10k-labels-idx1-ubyte")
    checksums = []
    for split, indices in draw(labels).items():
        rows = [np.concatenate(list(images[row]), axis=1) for row in indices]
        path = arguments.out / f"{split}.png"
        Image.fromarray(np.concatenate(rows)).save(path, optimize=True)
        checksums.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    (arguments.out / "SHA256SUMS").write_text("".join(checksums))


if __name__ == "__main__":
    main()
