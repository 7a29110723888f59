from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from sdaug_utils.compute import one_thread
from sdaug_utils.errors import InputError
from sdaug_utils.generation import personalisation
from sdaug_utils.generation.foundation import load_pipeline
from sdaug_utils.generation.technique import request
from sdaug_utils.generation.techniques import textual_inversion
from sdaug_utils.registry import techniques
from sdaug_utils.store import Store
from sdaug_utils.study import Study


@pytest.fixture
def pipeline(world):
    return load_pipeline(world.settings)


def parameters_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def with_settings(world, section, **changes):
    own = getattr(world.settings, section).model_copy(update=changes)
    settings = world.settings.model_copy(update={section: own})
    return Study(world.profile, settings, world.data, world.store)


def asked(world, technique, inputs):
    return request(world, techniques()[technique], "subject", "A {}", range(1), inputs=inputs)


def invert(pipeline, world, subjects, **changes):
    world = with_settings(world, "textual_inversion", **changes)
    requests = [asked(world, "textual-inversion", inputs) for inputs in subjects]
    return techniques()["textual-inversion"].embeddings(world, pipeline, requests)


def tune(pipeline, world, inputs, folder, **changes):
    """The pipeline with what DreamBooth saved of a U-Net that it fine-tuned."""
    world, technique = with_settings(world, "dreambooth", **changes), techniques()["dreambooth"]
    technique.learn(world, pipeline, [asked(world, "dreambooth", inputs)], [folder])
    return technique.apply(pipeline, folder)


def test_dreambooth_fine_tunes_a_copy_of_the_unet(world, pipeline, tmp_path):
    before = parameters_of(pipeline.unet)
    images = world.data.splits["train"].images(range(2))
    tuned, again = (tune(pipeline, world, images, tmp_path / name) for name in ("first", "second"))
    assert same(parameters_of(pipeline.unet), before)
    assert not same(parameters_of(tuned.unet), before)
    assert tuned.vae is pipeline.vae
    assert same(parameters_of(tuned.unet), parameters_of(again.unet))


def test_dreambooth_lowers_its_own_loss_and_prior_preservation_changes_it(
    world, pipeline, tmp_path
):
    images = world.data.splits["train"].images(range(2))
    longer = {"max_train_steps": 30, "train_batch_size": 8}
    models = [
        tune(pipeline, world, images, tmp_path / str(weight), prior_loss_weight=weight, **longer)
        for weight in (0.0, 1.0)
    ]
    assert not same(parameters_of(models[0].unet), parameters_of(models[1].unet))

    def loss(tuned):
        example = personalisation.NoisyLatents(pipeline, images, 32, seed=99)
        noisy, timesteps, target = example(256)
        with torch.no_grad():
            tokens = personalisation.token_ids(pipeline.tokenizer, ["<funny-ret>"], "cpu")
            embeddings = pipeline.text_encoder(tokens)[0].expand(256, -1, -1)
            return (tuned.unet(noisy, timesteps, embeddings).sample - target).square().mean()

    assert loss(models[0]) < loss(pipeline)


def test_subjects_learnt_together_are_learnt_as_if_alone(world, pipeline):
    train = world.data.splits["train"]
    subjects = [train.images([0, 1]), train.images([20, 21])]
    together = invert(pipeline, world, subjects)
    alone = invert(pipeline, world, subjects[1:])
    assert torch.allclose(together[1], alone[0], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-4)


def test_the_embedding_loads_with_diffusers_own_loader(world, pipeline, tmp_path):
    images = world.data.splits["train"].images([0, 1])
    [embedding] = invert(pipeline, world, [images])
    save_file({"<funny-ret>": embedding.clone()}, tmp_path / textual_inversion.FILE)
    size = len(pipeline.tokenizer)
    personalised = techniques()["textual-inversion"].apply(pipeline, tmp_path)
    token = personalised.tokenizer.convert_tokens_to_ids("<funny-ret>")
    table = personalised.text_encoder.get_input_embeddings().weight
    assert token == size
    assert torch.allclose(table[token], embedding)
    assert len(pipeline.tokenizer) == size
    assert personalised.unet is pipeline.unet


def test_an_initialiser_of_several_tokens_is_refused(world, pipeline):
    images = world.data.splits["train"].images([0])
    with pytest.raises(InputError, match=r"initializer_token: 'rhinoceros' is not a single"):
        invert(pipeline, world, [images], initializer_token="rhinoceros")


def test_class_images_of_two_draws_may_be_made_side_by_side(world, pipeline, tmp_path):
    world = with_settings(world, "sampling", num_inference_steps=6)
    technique = techniques()["dreambooth"]

    def images(store, draw):
        own = Study("smoke", world.settings, world.data, store)
        spec = technique.class_images_spec(world.settings, draw)
        with one_thread(world.settings):  # as all images are made
            return [image.tobytes() for image in technique.class_images(own, pipeline, spec)]

    alone = [images(Store(tmp_path / "alone"), draw) for draw in (0, 1)]
    with ThreadPoolExecutor(2) as executor:
        both = list(executor.map(partial(images, Store(tmp_path / "both")), (0, 1)))
    assert both == alone
    assert alone[0] != alone[1]
