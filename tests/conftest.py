import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from sdaug_utils.store import Store
from sdaug_utils.study import Study, open_study


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """No test reads or writes the project's own store and figures."""
    monkeypatch.setenv("SDAUG_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("SDAUG_FIGURES", str(tmp_path / "figures"))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def world(store) -> Study:
    """The smoke profile with an empty store."""
    torch.manual_seed(0)
    return open_study("smoke", store)
