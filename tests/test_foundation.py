import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import constants
from transformers import CLIPConfig, CLIPImageProcessor

from sdaug_utils import compute
from sdaug_utils.errors import InputError
from sdaug_utils.generation import foundation, pools
from sdaug_utils.generation.technique import pool_spec
from sdaug_utils.registry import techniques


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A copy of the shipped weights that a test may spoil."""
    folder = tmp_path / "weights"
    shutil.copytree(foundation.MINIATURE_WEIGHTS, folder)
    monkeypatch.setattr(foundation, "MINIATURE_WEIGHTS", folder)
    foundation.revision.cache_clear()
    yield folder
    foundation.revision.cache_clear()


def test_a_damaged_weight_is_named(weights):
    path = weights / "unet" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"unet/diffusion_pytorch_model\.safetensors: corrupt"):
        foundation.revision("miniature")
    path.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: missing"):
        foundation.revision("miniature")


def test_a_local_folder_is_a_foundation_and_its_content_is_its_revision(world, weights, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(weights, copy)
    before = foundation.revision(str(copy))
    pipeline = foundation.load_pipeline(world.settings.model_copy(update={"foundation": str(copy)}))
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipeline.unet.dtype == torch.float32
    foundation.revision.cache_clear()
    (copy / "controlnet-canny" / "config.json").write_text("{}")
    assert foundation.revision(str(copy)) == before
    foundation.revision.cache_clear()
    (copy / "unet" / "config.json").write_text("{}")
    assert foundation.revision(str(copy)) != before


def test_an_unknown_foundation_is_refused():
    with pytest.raises(InputError, match="'nowhere' is neither 'miniature' nor a folder nor a hub"):
        foundation.revision("nowhere")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_cache(cache, identifier, fill):
    """A model in the hub's cache, as a download leaves it."""
    folder = cache / f"models--{identifier.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    fill(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no internet."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for function in (foundation.revision, foundation._from_hub):
        function.cache_clear()
    yield tmp_path / "cache"
    for function in (foundation.revision, foundation._from_hub):
        function.cache_clear()


def tiny_safety_checker():
    """The parts of Stable Diffusion 1.5 that the miniature has not got, as small as they can be."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config={**text, "num_attention_heads": 2}, vision_config=vision, projection_dim=16
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    checker = StableDiffusionSafetyChecker(config)
    torch.nn.init.constant_(checker.concept_embeds_weights, 2.0)  # no cosine is above: all pass
    torch.nn.init.constant_(checker.special_care_embeds_weights, 2.0)
    return checker, processor


def whole_pipeline(world, folder):
    """A Stable Diffusion pipeline with every component, saved as on the hub."""
    parts = dict(foundation.load_pipeline(world.settings).components)
    parts["safety_checker"], parts["feature_extractor"] = tiny_safety_checker()
    StableDiffusionPipeline(**parts).save_pretrained(folder)


@pytest.fixture
def hub_study(world, cache):
    """A study whose models come from the hub: pipeline, safety checker and both ControlNets."""
    in_cache(cache, "some-lab/tiny-diffusion", lambda folder: whole_pipeline(world, folder))
    for kind in ("canny", "segmentation"):
        source = foundation.MINIATURE_WEIGHTS / f"controlnet-{kind}"
        in_cache(
            cache,
            f"some-lab/control-{kind}",
            lambda folder, source=source: shutil.copytree(source, folder, dirs_exist_ok=True),
        )
    controlnet = world.settings.controlnet.model_copy(
        update={"canny": "some-lab/control-canny", "segmentation": "some-lab/control-segmentation"}
    )
    settings = world.settings.model_copy(
        update={"foundation": "some-lab/tiny-diffusion", "controlnet": controlnet}
    )
    return type(world)(world.profile, settings, world.data, world.store)


@pytest.mark.parametrize("technique", list(techniques()))
def test_models_of_the_hub_run_every_technique(hub_study, technique):
    made = pools.technique_pools(hub_study, technique, 0, 1)
    assert [pool.attempts for pool in made] == [(1,), (1,)]
    spec = json.loads((made[0].files[0].parent / "spec.json").read_text())
    assert spec["foundation"] == COMMIT
    assert foundation.resolved("some-lab/tiny-diffusion") == f"some-lab/tiny-diffusion@{COMMIT}"


def test_the_safety_checker_rejects_by_its_flag_and_can_be_left_out(hub_study, cache):
    pipeline = foundation.load_pipeline(hub_study.settings)
    torch.nn.init.constant_(pipeline.safety_checker.concept_embeds_weights, -2.0)  # none passes
    sampling = hub_study.settings.sampling
    sample = pools.pipeline_sampler(pipeline, sampling, ["a bag"], [lambda some: {}])
    assert sample([(0, 0), (0, 1)], [1, 2]) == [None, None]
    sampling = sampling.model_copy(update={"safety_checker": False})
    unchecked = hub_study.settings.model_copy(update={"sampling": sampling})
    assert foundation.load_pipeline(unchecked).safety_checker is None
    specs = [
        pool_spec(settings, "test", "bag", "a bag", 0)
        for settings in (hub_study.settings, unchecked)
    ]
    assert specs[0] != specs[1]


@pytest.mark.parametrize("name", ["some-lab/nothing", "some-lab/nothing@v2"])
def test_a_missing_model_says_where_it_was_looked_for_and_how_to_get_it(cache, name):
    with pytest.raises(InputError, match="hf download some-lab/nothing") as caught:
        foundation.revision(name)
    assert str(cache) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="hf download some-lab/nothing"):
        foundation.revision(name, "controlnet-canny")


def test_a_hub_that_does_not_answer_leaves_the_cache(hub_study, monkeypatch):
    asked = []

    def timing_out(*arguments, **more):
        asked.append(arguments)
        raise RuntimeError("timed out")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(DiffusionPipeline, "download", timing_out)
    assert foundation.revision(hub_study.settings.foundation) == COMMIT
    with pytest.raises(InputError, match="hf download some-lab/nothing"):
        foundation.revision("some-lab/nothing")
    assert len(asked) == 2


def test_xformers_that_does_not_work_is_one_line(world, monkeypatch):
    settings = world.settings.model_copy(update={"attention": "xformers"})
    with pytest.raises(InputError, match="attention: xformers does not work here"):
        foundation.load_pipeline(settings)


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [("cpu", "auto", torch.float32), ("cpu", "bfloat16", torch.bfloat16)],
)
def test_precision_follows_the_device(world, device, precision, expected):
    settings = world.settings.model_copy(update={"device": device, "precision": precision})
    assert compute.device_of(settings).type == device
    assert compute.dtype_of(settings) == expected
