"""A tiny model and random texts of it; moments that count as wide."""

import numpy as np
import pytest

from locft_jax.editing.regularizers import second_moments
from locft_jax.io.hf_load import load_model


@pytest.fixture(scope="session")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir), mesh={"data": 1, "model": 1})


@pytest.fixture(scope="session")
def split_model(tiny_model_dir):
    """The same on eight devices."""
    return load_model(str(tiny_model_dir), mesh={"data": 2, "model": 4})


@pytest.fixture(scope="session")
def texts():
    """Token ids of 150 texts: several batches."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, 300, rng.integers(3, 30)).tolist() for _ in range(150)]


@pytest.fixture
def narrow(monkeypatch):
    """Everything counts as wide; 24 eigenvectors of it."""
    monkeypatch.setattr(second_moments, "EXACT", 8)
    monkeypatch.setattr(second_moments, "RANK", 24)
