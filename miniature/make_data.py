"""Draw the study's 3,500 images from Fashion-MNIST's test file and write them as PNG sheets.

A fourth sheet holds a sample of the train file, from which the foundation model has learnt: real
images to be retrieved in place of generated ones. None of it is nearer to an image of the study
than the two most alike images of the study are to each other.

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
CORPUS_PER_CLASS = 200


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


def distances(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Root mean square distances in grey levels, 0 to 255, of images (n, ...) and (m, ...)."""
    first, second = (x.reshape(len(x), -1).astype(np.float32) for x in (some, others))
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    return np.sqrt(np.maximum(squares, 0) / first.shape[1])


def draw_corpus(images: np.ndarray, labels: np.ndarray, study: np.ndarray) -> np.ndarray:
    """Indices into the train file, shape (classes, CORPUS_PER_CLASS)."""
    among = distances(study, study)
    np.fill_diagonal(among, np.inf)
    rng, chosen = np.random.default_rng(SEED), []
    for label in range(NUM_CLASSES):
        order = rng.permutation(np.flatnonzero(labels == label))[: 2 * CORPUS_PER_CLASS]
        is_far = distances(images[order], study).min(axis=1) >= among.min()
        chosen.append(order[is_far][:CORPUS_PER_CLASS])
    print(f"smallest distance within the study: {among.min():.1f} grey levels")
    return np.stack(chosen)


def write_sheet(path: Path, images: np.ndarray, indices: np.ndarray) -> str:
    """A row of tiles per class; its line of SHA256SUMS."""
    rows = [np.concatenate(list(images[row]), axis=1) for row in indices]
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()

    images = read_idx(arguments.source / "t10k-images-idx3-ubyte")
    labels = read_idx(arguments.source / "t10k-labels-idx1-ubyte")
    splits = draw(labels)
    checksums = [
        write_sheet(arguments.out / f"{split}.png", images, indices)
        for split, indices in splits.items()
    ]
    study = images[np.concatenate([indices.ravel() for indices in splits.values()])]
    images = read_idx(arguments.source / "train-images-idx3-ubyte")
    labels = read_idx(arguments.source / "train-labels-idx1-ubyte")
    corpus = draw_corpus(images, labels, study)
    checksums.append(write_sheet(arguments.out / "corpus.png", images, corpus))
    (arguments.out / "SHA256SUMS").write_text("".join(checksums))


if __name__ == "__main__":
    main()
