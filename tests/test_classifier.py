"""Classifiers: heads that learn as they should, and the published protocol."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import ResNet34_Weights, resnet34

from sdaug_utils.params import Controlled, Published
from sdaug_utils.training import classifier, features

CONTROLLED = Controlled(
    learning_rate=0.1,
    batch_size=8,
    max_train_steps=200,
    validation_steps=50,
    min_views=2,
    min_synthetic_views=1,
    num_augmented=8,
)
PUBLISHED = Published(
    learning_rate=1e-3, batch_size=4, max_epochs=3, patience=2, passes_per_epoch=1, image_size=32
)


def blobs(num_images, seed):
    """Two classes that a linear head separates."""
    generator = torch.Generator().manual_seed(seed)
    labels = np.arange(num_images) % 2
    features = torch.randn(num_images, 1, 4, generator=generator)
    features[:, 0, 0] += torch.from_numpy(6.0 * labels - 3)
    return features, labels


def test_a_separable_problem_is_solved_and_the_best_weights_are_kept():
    features, labels = blobs(64, 0)
    validation, validation_labels = blobs(40, 1)
    test, test_labels = blobs(100, 2)
    data = classifier.TrainingSet(features, torch.from_numpy(labels), seed=0)
    [outcome] = classifier.train_controlled(
        [data], (validation[:, 0], validation_labels), test[:, 0], CONTROLLED, 2
    )
    assert (outcome.predictions == test_labels).mean() > 0.97
    assert outcome.validation_score > 0.97
    assert outcome.num_updates == 200

    scores = {}
    targets = torch.from_numpy(validation_labels)

    def look(step, head):
        scores[step] = classifier.accuracy(head, validation[:, 0], targets)

    classifier.train_head(data, CONTROLLED, 2, 50, look)
    assert outcome.selected_step == max(scores, key=scores.get)  # the first of the best
    assert outcome.validation_score == max(scores.values())


def test_the_written_out_gradient_is_that_of_autograd():
    features, labels = blobs(64, 0)
    targets, reached = torch.from_numpy(labels), {}

    def keep(step, head):
        reached[step] = head.weight.detach().clone(), head.bias.detach().clone()

    data = classifier.TrainingSet(features, targets, seed=3)
    classifier.train_head(data, CONTROLLED, 2, 200, keep)
    head = classifier.new_head(4, 2, 3)
    optimizer = torch.optim.SGD(head.parameters(), lr=CONTROLLED.learning_rate)
    for rows in classifier.batches(64, 8, 200, seed=3):
        loss = nn.functional.cross_entropy(head(features[rows, 0]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(reached[200][0], head.weight, atol=1e-5)
    assert torch.allclose(reached[200][1], head.bias, atol=1e-5)


def test_an_image_with_fewer_views_has_each_of_them_more_often():
    """As if they were repeated until all images have as many."""
    views = torch.randn(60, 6, 4, generator=torch.Generator().manual_seed(0))
    views[40:, 2:] = views[40:, :2].repeat(1, 2, 1)
    flat = torch.cat([views[:40].flatten(0, 1), views[40:, :2].flatten(0, 1)])
    each, labels = torch.tensor([6] * 40 + [2] * 20), torch.arange(60) % 2

    def learnt(vectors, counts=None):
        reached = []
        data = classifier.TrainingSet(vectors, labels, 3, counts)
        classifier.train_head(
            data, CONTROLLED, 2, 200, lambda _, head: reached.append(head.weight.detach().clone())
        )
        return reached[0]

    assert torch.equal(learnt(views), learnt(flat, each))
    changed = flat.clone()
    changed[-1] += 1.0  # the last view of the last image
    assert not torch.equal(learnt(changed, each), learnt(flat, each))


def test_what_a_head_learns_does_not_depend_on_those_beside_it():
    generator = torch.Generator().manual_seed(0)
    sets = [
        classifier.TrainingSet(
            torch.randn(40 + 8 * seed, 2, 1280, generator=generator),
            torch.arange(40 + 8 * seed) % 10,
            seed,
        )
        for seed in range(9)
    ]
    held_out = torch.randn(100, 1280, generator=generator), np.arange(100) % 10

    def train(some):
        return classifier.train_controlled(some, held_out, held_out[0], CONTROLLED, 10)

    together = train(sets)
    for size in (1, 2, 5):
        apart = [outcome for i in range(0, 9, size) for outcome in train(sets[i : i + size])]
        for one, other in zip(together, apart, strict=True):
            assert (one.predictions == other.predictions).all()
            assert one.validation_score == other.validation_score


def test_seeds_decide_the_head_and_the_order():
    assert torch.equal(classifier.new_head(4, 2, 1).weight, classifier.new_head(4, 2, 1).weight)
    assert not torch.equal(classifier.new_head(4, 2, 1).weight, classifier.new_head(4, 2, 2).weight)
    order = classifier.batches(10, 4, 5, seed=3)
    assert order.shape == (5, 4)
    assert sorted(order.flatten()[:10].tolist()) == list(range(10))  # an epoch sees each once
    assert torch.equal(order, classifier.batches(10, 4, 5, seed=3))


class RecordingSGD(torch.optim.SGD):
    """Keeps the weights after each update."""

    after: list = []  # noqa: RUF012

    def step(self, *arguments):
        super().step(*arguments)
        weights = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.after.append(weights)


@pytest.mark.parametrize("backbone", ["efficientnet-lite0", "resnet34"])
@pytest.mark.parametrize(
    ("patience", "passes", "stops_early"), [(5, 1, False), (1, 1, True), (1, 2, True)]
)
def test_published_training_equals_a_plain_loop(
    world, monkeypatch, backbone, patience, passes, stops_early
):
    """BatchNorm in train mode, no normalisation, last weights: the same weights at every update."""
    torch.manual_seed(0)
    random = resnet34().state_dict()
    monkeypatch.setattr(ResNet34_Weights, "get_state_dict", lambda self, **_: random)
    features.load_backbone.cache_clear()
    monkeypatch.setattr(torch.optim, "SGD", RecordingSGD)
    monkeypatch.setattr(RecordingSGD, "after", [])
    train, test = world.data.splits["train"], world.data.splits["test"]
    rows = np.array([0, 1, 2, 20, 21, 22])
    images, labels = train.images(rows), train.labels[rows]
    validation = world.data.splits["validation"]
    outcome = classifier.train_published(
        images,
        labels,
        (validation.images(), validation.labels),
        test.images(),
        backbone,
        "none",
        PUBLISHED.model_copy(
            update={"patience": patience, "max_epochs": 6, "passes_per_epoch": passes}
        ),
        5,
        2,
    )

    network = copy.deepcopy(features.load_backbone(backbone))
    features.load_backbone.cache_clear()
    torch.manual_seed(5)
    head = nn.Linear(network.num_features, 2)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    scores, updates = [], iter(RecordingSGD.after)
    for epoch in range(6):
        network.train()
        orders = [
            np.random.default_rng((5, epoch * passes + number)).permutation(6)
            for number in range(passes)
        ]
        for batch in (part for order in orders for part in (order[:4], order[4:])):
            with torch.no_grad():
                seen_features = network(pixels[batch])
            loss = nn.functional.cross_entropy(head(seen_features), torch.from_numpy(labels[batch]))
            head.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter, theirs in zip(head.parameters(), next(updates), strict=True):
                    parameter -= 1e-3 * parameter.grad
                    torch.testing.assert_close(parameter, theirs, rtol=1e-5, atol=1e-7)
        network.eval()
        with torch.no_grad():
            seen = torch.from_numpy(np.stack(validation.images())).permute(0, 3, 1, 2) / 255
            scores.append((head(network(seen)).argmax(1).numpy() == validation.labels).mean())
        best_epoch = scores.index(max(scores))  # the first of equals
        if epoch - best_epoch >= patience:
            break
    assert (len(scores) < 6) == stops_early
    assert next(updates, None) is None
    with torch.no_grad():
        held = torch.from_numpy(np.stack(test.images())).permute(0, 3, 1, 2) / 255
        expected = head(network(held)).argmax(1).numpy()
    np.testing.assert_array_equal(outcome.predictions, expected)
    assert outcome.validation_score == scores[-1]
    assert outcome.num_updates == 2 * passes * len(scores)


def test_published_training_leaves_the_shared_backbone_alone(world):
    backbone = features.load_backbone("efficientnet-lite0")
    before = backbone.bn1.running_mean.clone()
    train, validation = world.data.splits["train"], world.data.splits["validation"]
    held = (validation.images(), validation.labels)
    classifier.train_published(
        train.images([0, 20]),
        train.labels[[0, 20]],
        held,
        held[0],
        "efficientnet-lite0",
        "randaugment",
        PUBLISHED,
        0,
        2,
    )
    assert torch.equal(backbone.bn1.running_mean, before)
    assert not backbone.training


def test_images_that_do_not_fit_into_memory_are_resized_as_they_come(world, monkeypatch):
    images, labels = world.data.splits["train"].images(), world.data.splits["train"].labels
    settings = world.settings.classifier.published.model_copy(update={"max_epochs": 2})

    def predictions():
        outcome = classifier.train_published(
            images, labels, (images, labels), images, "efficientnet-lite0", "none", settings, 0, 2
        )
        return outcome.predictions.tolist(), outcome.validation_score

    kept = predictions()
    monkeypatch.setattr(classifier, "KEPT_BYTES", 0)
    assert predictions() == kept
