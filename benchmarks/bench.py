"""What is fast, side by side: each line compares two ways of one piece of work in one run.

    python benchmarks/bench.py    writes benchmarks/results/bench.json and scaling.png, and the
                                  table "How fast" of README.md

The ways take turns, five rounds; a line's ratio is the median of the rounds' own ratios. So a
machine that is shared, and slower now than then, tells the same. The other ways are what one would
write without the study's module: each as its authors do it, with the same steps and batches.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDPMScheduler
from machine import describe

from sdaug_utils.compute import peak_memory
from sdaug_utils.evidence import figures
from sdaug_utils.generation import pools
from sdaug_utils.generation.foundation import load_pipeline, scale_condition
from sdaug_utils.generation.personalisation import token_ids
from sdaug_utils.generation.technique import technique_requests
from sdaug_utils.registry import techniques
from sdaug_utils.store import Store
from sdaug_utils.study import Study, open_study
from sdaug_utils.training import classifier
from sdaug_utils.training.features import image_features, load_backbone, normalise, to_pixels
from sdaug_utils.training.runs import repeated
from sdaug_utils.training.trainer import STACK, results_of

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
START, END = "<!-- made by 'make bench' -->", "<!-- end of bench -->"
ROUNDS = 5
LOADED_FOR = 5  # images, as in the thesis
EPOCHS = 55
PLAIN = "stable-diffusion-prompt"


def afresh(study: Study, folder: str, **changes: Any) -> Study:
    """The study with an empty store of its own, and some settings changed."""
    settings = study.settings.model_copy(update=changes)
    return Study(study.profile, settings, study.data, Store(tempfile.mkdtemp(dir=folder)))


def seconds(items: int, work: Callable[..., object], *arguments: Any) -> float:
    """How long a piece of work takes, per item."""
    began = time.perf_counter()
    work(*arguments)
    return (time.perf_counter() - began) / items


# A thousand images: the study's pools, a bare loop, a pipeline that is loaded for every five.


def make_images(study: Study, per_class: int, num_classes: int | None = None) -> None:
    """Pools of plain prompts."""
    pools.fill(study, technique_requests(study, PLAIN, 0, per_class)[:num_classes])


@torch.no_grad()
def bare_loop(study: Study, pipeline: Any, per_class: int) -> None:
    """Classifier-free guidance by two passes of the U-Net, then the VAE; nothing is written."""
    sampling, size = study.settings.sampling, study.settings.sampling.batch_size
    channels, side = pipeline.unet.config.in_channels, pipeline.unet.config.sample_size
    for class_name in study.data.class_names:
        words = pipeline.encode_prompt(sampling.prompt.format(class_name), "cpu", size, True)
        embeddings = torch.cat([words[1], words[0]])
        for _ in range(0, per_class, size):
            scheduler = copy.deepcopy(pipeline.scheduler)
            scheduler.set_timesteps(sampling.num_inference_steps)
            latents = torch.randn(size, channels, side, side) * scheduler.init_noise_sigma
            told = scale_condition(pipeline, 2 * size)
            for timestep in scheduler.timesteps:
                twice = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
                both = pipeline.unet(twice, timestep, embeddings, timestep_cond=told).sample
                without, with_words = both.chunk(2)
                guided = without + sampling.guidance_scale * (with_words - without)
                latents = scheduler.step(guided, timestep, latents).prev_sample
            pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor)


def load_for_five(study: Study) -> None:
    """What the thesis's code did for every five images."""
    pipeline, sampling = load_pipeline(study.settings), study.settings.sampling
    prompt = sampling.prompt.format(study.data.class_names[0])
    side = {"height": sampling.resolution, "width": sampling.resolution}
    sample = pools.pipeline_sampler(pipeline, sampling, [prompt], [lambda some: side])
    sample([(0, 0)] * LOADED_FOR, range(LOADED_FOR))


# A head over 55 epochs: on cached features, or through the frozen backbone.


def train_stack(study: Study) -> None:
    """As many heads as a stack holds, on the same images: features are made once for all."""
    train = study.data.splits["train"]
    features, labels = image_features(study, train.images()), torch.from_numpy(train.labels)
    settings = study.settings.classifier.controlled
    steps = EPOCHS * -(-len(train) // settings.batch_size)
    settings = settings.model_copy(update={"max_train_steps": steps})
    sets = [classifier.TrainingSet(features, labels, seed) for seed in range(STACK)]
    classifier.train_heads(sets, settings, len(study.data.class_names), steps, lambda *_: None)


def train_through_backbone(study: Study, pixels: torch.Tensor) -> None:
    """One epoch, images of the final size at hand."""
    backbone: Any = load_backbone(study.settings.classifier.backbone)
    labels = torch.from_numpy(study.data.splits["train"].labels)
    settings = study.settings.classifier.controlled
    head = torch.nn.Linear(backbone.num_features, len(study.data.class_names))
    optimizer = torch.optim.SGD(head.parameters(), lr=settings.learning_rate)
    for rows in torch.randperm(len(pixels)).split(settings.batch_size):
        with torch.no_grad():
            features = backbone(normalise(pixels[rows], backbone))
        loss = torch.nn.functional.cross_entropy(head(features), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# Personalisation: several subjects, or diffusers' example scripts for one.


def personalise(study: Study, technique: str, pipeline: Any) -> None:
    """A model for each class, saved."""
    requests = technique_requests(study, technique, 0, 1)
    pools.learn_models(study, requests)


def example_loop(study: Study, technique: str, pipeline: Any) -> None:
    """The training loop of diffusers' example for the technique, for one subject.

    Images are encoded and prompts are read in every step.
    """
    settings = getattr(study.settings, technique.replace("-", "_"))
    side = study.settings.sampling.resolution
    inputs = study.data.splits["train"].images(range(5))
    pixels = torch.stack([to_pixels([image])[0] * 2 - 1 for image in inputs])
    assert pixels.shape[-1] == side
    unet, text_encoder = copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.text_encoder)
    unet.requires_grad_(technique == "dreambooth")
    text_encoder.requires_grad_(False)
    learnt = list(unet.parameters())
    if technique == "textual-inversion":
        table = text_encoder.get_input_embeddings().weight.requires_grad_(True)
        learnt, kept = [table], table.detach().clone()
    optimizer = torch.optim.AdamW(learnt, lr=settings.learning_rate)
    scheduler, size = (
        DDPMScheduler.from_config(pipeline.scheduler.config),
        settings.train_batch_size,
    )
    told = scale_condition(pipeline, size)
    for _ in range(settings.max_train_steps):
        with torch.no_grad():
            chosen = pixels[torch.randint(len(pixels), (size,))]
            latents = pipeline.vae.encode(chosen).latent_dist.sample()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (size,))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        ids = token_ids(pipeline.tokenizer, ["a photo of a product"] * size, pipeline.device)
        prediction = unet(noisy, timesteps, text_encoder(ids)[0], timestep_cond=told).sample
        target = scheduler.get_velocity(latents, noise, timesteps)
        loss = torch.nn.functional.mse_loss(prediction, target)
        loss.backward()
        if technique == "dreambooth":
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if technique == "textual-inversion":
            with torch.no_grad():
                table[1:] = kept[1:]


def measured(study: Study, folder: str) -> dict[str, dict[str, Any]]:
    """Each line: the median ratio, and the median seconds per item of both ways."""
    pipeline = load_pipeline(study.settings)
    resized = [np.asarray(image) for image in study.data.splits["train"].images()]
    pixels = torch.nn.functional.interpolate(
        to_pixels(resized), size=study.settings.classifier.image_size, mode="bilinear"
    )
    classes = len(study.data.class_names)
    whole, per_class = classes * (1000 // classes), 1000 // classes

    def ours(items: int, work: Callable[..., object], *arguments: Any) -> float:
        return seconds(items, work, afresh(study, folder), *arguments)

    works: list[tuple[str, Callable[[], float], dict[str, Callable[[], float]]]] = [
        (
            "image, of a pool of 1,000",
            partial(ours, whole, make_images, per_class),
            {
                "a bare loop of guided U-Net and VAE passes": partial(
                    seconds, whole, bare_loop, study, pipeline, per_class
                ),
                "a pipeline that is loaded for every five images": partial(
                    seconds, LOADED_FOR, load_for_five, study
                ),
            },
        ),
        (
            f"epoch of a head, over {EPOCHS} of them, features included (nine heads share them)",
            partial(ours, STACK * EPOCHS, train_stack),
            {
                "training through the frozen backbone": partial(
                    seconds, 1, train_through_backbone, study, pixels
                )
            },
        ),
    ]
    for technique in ("dreambooth", "textual-inversion"):
        works.append(
            (
                f"model by {techniques()[technique].label}",
                partial(ours, classes, personalise, technique, pipeline),
                {
                    "diffusers' example loop": partial(
                        seconds, 1, example_loop, study, technique, pipeline
                    )
                },
            )
        )
    rounds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(ROUNDS):
        for item, way, others in works:
            own = way()
            for other, theirs in others.items():
                rounds.setdefault((item, other), []).append((own, theirs()))
        print(f"round {number + 1} of {ROUNDS}", flush=True)
    return {
        f"{item}, against {other}": {
            "item": item,
            "other way": other,
            "seconds, ours": round(statistics.median(own for own, _ in pairs), 5),
            "seconds, other way": round(statistics.median(theirs for _, theirs in pairs), 5),
            "times as fast": round(statistics.median(theirs / own for own, theirs in pairs), 2),
        }
        for (item, other), pairs in rounds.items()
    }


def pool_memory(count: int) -> float:
    """GiB at most while a pool of ``count`` images is made and read, in a process of its own."""
    command = [sys.executable, __file__, "--pool", str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def grow_pool(count: int) -> None:
    """Make and read a pool; print the peak memory of this process, GiB."""
    study = open_study("miniature")
    sampling = study.settings.sampling.model_copy(update={"num_inference_steps": 1})
    with tempfile.TemporaryDirectory() as folder:
        own = afresh(study, folder, sampling=sampling)
        [request, *_] = technique_requests(own, PLAIN, 0, count)
        [pool] = pools.fill(own, [request])
        assert sum(image.shape[0] > 0 for image in pool.images()) == count
    print(peak_memory())


def scaling(study: Study, folder: str) -> dict[str, dict[int, float]]:
    """Seconds by number of images, classes and training runs, everything else equal."""
    trained, arms = afresh(study, folder), [{"real_percent": 100.0}]

    def train(first: int, count: int) -> None:
        grid = repeated(arms, "controlled", 1, first + count)
        results_of(trained, grid[first:])

    make_images(afresh(study, folder), 20, 1)  # whoever is first reads the model's files
    train(0, 1)
    images, classes, trainings = (100, 200, 400, 800), (2, 4, 6, 8, 10), (18, 36, 72, 144)
    firsts = [1, *np.cumsum(trainings) + 1]  # what is in the store already would cost nothing
    return {
        "images of a class": {
            count: seconds(1, make_images, afresh(study, folder), count, 1) for count in images
        },
        "classes": {
            count: seconds(1, make_images, afresh(study, folder), 40, count) for count in classes
        },
        "runs": {
            count: seconds(1, train, first, count)
            for first, count in zip(firsts, trainings, strict=False)
        },
    }


def plot(found: Mapping[str, Mapping[int, float]]) -> None:
    """Time against size, with the straight line through the measurements."""
    figures.set_style()
    figure, axes = plt.subplots(1, len(found), figsize=(9, 2.8), layout="constrained")
    for panel, (name, times) in zip(axes, found.items(), strict=True):
        x, y = np.array(list(times)), np.array(list(times.values()))
        line = np.polyfit(x, y, 1)
        panel.plot(x, y, "o", color="#3a6fb0")
        panel.plot(x, np.polyval(line, x), color="black", lw=1)
        panel.set(xlabel=name, ylabel="seconds", ylim=(0, None), xlim=(0, None), xticks=[0, *x])
    figure.savefig(RESULTS / "scaling.png")


def two_digits(value: float) -> float:
    """What of a ratio is the same when it is measured again."""
    return float(f"{value:.2g}")


def table(result: Mapping[str, Any]) -> str:
    """README's table."""
    rows = ["| one … | against … | times as fast |", "|---|---|---|"]
    rows += [
        f"| {line['item']} | {line['other way']} | {two_digits(line['times as fast']):g} |"
        for line in result["side by side"].values()
    ]
    small, large = result["peak memory by images of a pool, GiB"].values()
    study = json.loads((RESULTS / "study.json").read_text())
    machine = study["machine"]
    rows += [
        "",
        f"`make study` takes {study['minutes, empty store']:g} minutes from an empty store and "
        f"{study['seconds, everything made']:.0f} seconds with everything made, in "
        f"{study['peak memory of the largest process, GiB']:g} GiB of memory "
        f"({machine['processor']}, {machine['cores']} cores). Making and reading a pool of 10,000 "
        f"images takes {large:.2f} GiB, one of 100 {small:.2f}. Time grows in a straight line with "
        "images, classes and training runs:",
        "",
        "![time against images, classes and runs](benchmarks/results/scaling.png)",
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pool:
        return grow_pool(arguments.pool)
    study = open_study("miniature")
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "machine": describe(),
            "side by side": measured(study, folder),
            "peak memory by images of a pool, GiB": {n: pool_memory(n) for n in (100, 10_000)},
            "seconds by size": scaling(study, folder),
        }
    plot(result["seconds by size"])  # type: ignore[arg-type]
    (RESULTS / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(START)
    made = table(result)
    readme.write_text(f"{before}{START}\n{made}\n{END}{rest.split(END)[1]}")
    print(made)


if __name__ == "__main__":
    main()
