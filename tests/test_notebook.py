"""The Colab notebook, executed from top to bottom on one CPU device, and the parts that only Colab runs."""

import copy
import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "edit_on_colab_tpu.ipynb"
# What Colab has, as far as the notebook uses it.
COLAB = """
import sys, types
files = types.SimpleNamespace(download=lambda path: print("downloaded", path))
sys.modules |= {"google.colab": types.SimpleNamespace(files=files)}
offer(result.delta, "colab-delta.safetensors")
"""
# The first cell where locft_jax is not installed, and a pip that refuses.
INSTALL = """
import importlib.util, subprocess, types
seen = []
def run(command, **kwargs):
    seen.append([command, Path(command[command.index("--constraint") + 1]).read_text().splitlines()])
    return types.SimpleNamespace(returncode=1, stderr="jax is too old")
importlib.util.find_spec, subprocess.run = lambda name: None, run
try:
    exec({source!r}, {{}})
except RuntimeError as e:
    print(json.dumps([seen, str(e)]))
"""
FIGURES = "import json; print(json.dumps([result.report, len(result.delta.new), str(demo / 'model')]))"


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(PATH, as_version=4)


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


def test_it_pins_no_jax(notebook):
    text = "\n".join(cell.source for cell in notebook.cells)
    assert not re.search(r"(jax|jaxlib|libtpu|numpy)(\[\w+\])?\s*[=<>~!]=\s*\d", text)


def test_installing_keeps_the_jax_that_is_there(executed):
    ((command, kept),), message = json.loads(executed.more[5])
    assert command[1:4] == ["-m", "pip", "install"] and command[-1] == ".."
    assert f"jax=={version('jax')}" in kept and f"numpy=={version('numpy')}" in kept
    assert all(re.fullmatch(r"(jax|libtpu|numpy)[\w.-]*==[\w.]+", line) for line in kept)
    assert message == "pip cannot install ..:\njax is too old"


@pytest.fixture(scope="module")
def executed(notebook: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The text that each cell printed or displayed, in order; then that of cells which only a test has."""
    folder = tmp_path_factory.mktemp("notebook")
    longer = copy.deepcopy(notebook)
    (real,) = (
        cell.source for cell in notebook.cells if 'MODEL = ""' in cell.source and "facts" in cell.source
    )
    given = re.sub(r'^MODEL = "".*$', 'MODEL = str(demo / "model")', real, flags=re.M)
    cold, warm = given, given.replace("EVEN_ON_CPU = False", "EVEN_ON_CPU = True")
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    added = (FIGURES, COLAB, cold, warm, FIGURES, INSTALL.format(source=first))
    longer.cells += [nbformat.v4.new_code_cell(source) for source in added]

    env = os.environ | {
        "XLA_FLAGS": "",
        "IPYTHONDIR": str(folder / "ipython"),
    }  # one device, not the tests' eight
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        client = NotebookClient(longer, timeout=600, resources={"metadata": {"path": str(folder)}})
        client.execute(env=env)
    texts = [
        "".join(
            o.get("text", "") or o.get("data", {}).get("text/markdown", "") for o in cell.get("outputs", [])
        )
        for cell in longer.cells
    ]
    count = len(notebook.cells)
    return SimpleNamespace(folder=folder, texts=texts[:count], more=texts[count:])


def test_the_demo_is_edited(executed):
    text = "\n".join(executed.texts)
    report, tensors, _ = json.loads(executed.more[0])
    assert report["edits"] == 20 and tensors == 1 and report["stopped"] == "loss_floor"
    assert report["before"]["reliability"] == 0 and report["after"]["reliability"] == 1
    assert re.search(r"jax [\d.]+, 1 x cpu \(cpu\)", text) and "no TPU or GPU here" in text
    assert "| reliability | 0% | 100% |" in text and "| locality_agreement |  | " in text
    assert "| reliability | Halvor Vasterby is by profession a | farmer | detective | detective |" in text
    assert "as loaded: reliability 0%\nedited: reliability 100%\n" in text
    assert "skipped: write the name of a checkpoint" in executed.texts[-2]


def test_the_delta_is_offered(executed):
    from locft_jax.io.delta import load_delta

    path = executed.folder / "demo-delta.safetensors"
    assert f"the delta is {path}" in "\n".join(executed.texts)
    assert list(load_delta(path).new) == ["model.layers.6.mlp.down_proj.weight"]
    assert executed.more[1] == f"downloaded {executed.folder / 'colab-delta.safetensors'}\n"


def test_a_checkpoint_by_name(executed):
    """The cell that a user fills in: with the demo model for the name of a real one."""
    assert "skipped: there is no TPU or GPU here" in executed.more[2]
    report, _, name = json.loads(executed.more[4])
    assert report["model"] == name and report["edits"] == 3
    # The settings are for models that are a thousand times larger: here they teach some of the facts.
    assert report["after"]["reliability"] > report["before"]["reliability"] == 0
    assert (
        "| reliability | 0% | " in executed.more[3]
        and "| locality | The capital of France is | " in executed.more[3]
    )
    assert (executed.folder / "delta.safetensors").exists()
