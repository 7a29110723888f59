import shutil

import pytest
import torch

from sdaug_utils import foundation
from sdaug_utils.errors import InputError


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
    with pytest.raises(InputError, match="'no/such' is neither 'miniature' nor a folder"):
        foundation.revision("no/such")


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [("cpu", "auto", torch.float32), ("cpu", "bfloat16", torch.bfloat16)],
)
def test_precision_follows_the_device(world, device, precision, expected):
    settings = world.settings.model_copy(update={"device": device, "precision": precision})
    assert foundation.device_of(settings).type == device
    assert foundation.dtype_of(settings) == expected
