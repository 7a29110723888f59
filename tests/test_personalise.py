import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from sdaug_utils.foundation import load_pipeline

from sdaug_utils import personalise
from sdaug_utils.errors import InputError


@pytest.fixture
def pipeline(world):
    return load_pipeline(world.settings)


def parameters_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def invert(pipeline, world, subjects, seeds, root, **changes):
    folders = [root / str(seed) for seed in seeds]
    for folder in folders:
        folder.mkdir(parents=True)
    settings = world.settings.textual_inversion.model_copy(update=changes)
    personalise.textual_inversion(pipeline, subjects, settings, 32, seeds, folders)
    return [load_file(folder / personalise.EMBEDDING_FILE)["<funny-ret>"] for folder in folders]


def test_dreambooth_fine_tunes_a_copy_of_the_unet(world, pipeline, tmp_path):
    before = parameters_of(pipeline.unet)
    images = world.data.splits["train"].images(range(2))
    settings = world.settings.dreambooth
    for name in ("first", "second"):
        personalise.dreambooth(pipeline, images, images, settings, 32, 7, tmp_path / name)
    assert same(parameters_of(pipeline.unet), before)
    tuned = personalise.apply(pipeline, tmp_path / "first")
    assert not same(parameters_of(tuned.unet), before)
    assert tuned.vae is pipeline.vae
    again = personalise.apply(pipeline, tmp_path / "second")
    assert same(parameters_of(tuned.unet), parameters_of(again.unet))


def test_dreambooth_lowers_its_own_loss_and_prior_preservation_changes_it(
    world, pipeline, tmp_path
):
    images = world.data.splits["train"].images(range(2))
    alone = world.settings.dreambooth.model_copy(
        update={"prior_loss_weight": 0.0, "max_train_steps": 30, "train_batch_size": 8}
    )
    personalise.dreambooth(pipeline, images, [], alone, 32, 7, tmp_path / "alone")
    with_prior = alone.model_copy(update={"prior_loss_weight": 1.0})
    personalise.dreambooth(pipeline, images, images[:1], with_prior, 32, 7, tmp_path / "prior")
    models = [personalise.apply(pipeline, tmp_path / name) for name in ("alone", "prior")]
    assert not same(parameters_of(models[0].unet), parameters_of(models[1].unet))

    def loss(tuned):
        encoded = personalise.encode_images(pipeline, images, 32)
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        example = personalise.NoisyLatents(encoded, scheduler, 1.0, seed=99)
        noisy, timesteps, target = example(256)
        with torch.no_grad():
            tokens = personalise._token_ids(pipeline, ["<funny-ret>"])
            embeddings = pipeline.text_encoder(tokens)[0].expand(256, -1, -1)
            return (tuned.unet(noisy, timesteps, embeddings).sample - target).square().mean()

    assert loss(models[0]) < loss(pipeline)


def test_subjects_learnt_together_are_learnt_as_if_alone(world, pipeline, tmp_path):
    train = world.data.splits["train"]
    subjects = [train.images([0, 1]), train.images([20, 21])]
    together = invert(pipeline, world, subjects, [3, 4], tmp_path / "together")
    alone = invert(pipeline, world, subjects[1:], [4], tmp_path / "alone")
    assert torch.allclose(together[1], alone[0], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-4)


def test_the_embedding_loads_with_diffusers_own_loader(world, pipeline, tmp_path):
    images = world.data.splits["train"].images([0, 1])
    [embedding] = invert(pipeline, world, [images], [3], tmp_path)
    size = len(pipeline.tokenizer)
    personalised = personalise.apply(pipeline, tmp_path / "3")
    token = personalised.tokenizer.convert_tokens_to_ids("<funny-ret>")
    table = personalised.text_encoder.get_input_embeddings().weight
    assert token == size
    assert torch.allclose(table[token], embedding)
    assert len(pipeline.tokenizer) == size
    assert personalised.unet is pipeline.unet


def test_an_initialiser_of_several_tokens_is_refused(world, pipeline, tmp_path):
    images = world.data.splits["train"].images([0])
    with pytest.raises(InputError, match=r"initializer_token: 'rhinoceros' is not a single"):
        invert(pipeline, world, [images], [1], tmp_path, initializer_token="rhinoceros")
