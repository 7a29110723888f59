"""One set of versions: the lock, the GPU environment and pyproject.toml agree."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines):
    found = (line.split("==") for line in lines if "==" in line)
    return {normalised(name.strip()): version.strip() for name, version in found}


def test_the_gpu_environment_differs_from_the_lock_in_torch_only():
    lock = pins((ROOT / "requirements.lock").read_text().splitlines())
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    gpu = pins(environment["dependencies"][-1]["pip"])
    assert gpu.pop("xformers")
    assert {name for name in gpu if gpu[name] != lock[name]} == {"torch", "torchvision"}


def test_every_dependency_is_locked():
    lock = pins((ROOT / "requirements.lock").read_text().splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {normalised(re.split(r"[<>=]", requirement)[0]) for requirement in wanted}
    assert names <= set(lock)
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    gpu = pins(environment["dependencies"][-1]["pip"])
    own = {normalised(re.split(r"[<>=]", one)[0]) for one in project["dependencies"]}
    assert own <= set(gpu)
