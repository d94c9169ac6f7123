"""Which edit is planned: the model's shape, the site, and the lengths of its texts. Nothing is downloaded."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from locft_jax.config import Config
from locft_jax.data.packing import Corpus, corpus_from_lists
from locft_jax.data.requests import read_requests
from locft_jax.data.tokenize import TextEncoder
from locft_jax.editing.regularizers.preconditioner import check_preserve
from locft_jax.editing.run import choose_site
from locft_jax.editing.site import first_layer
from locft_jax.errors import UserError
from locft_jax.io.hf_folder import open_folder
from locft_jax.io.hf_load import load_tokenizer
from locft_jax.model.spec import ModelSpec, parse_spec, read_config
from locft_jax.prepare import Base, prepare

EDITS = 3000  # where the config does not say how many
SAMPLE = 3000  # texts that batches are made of, where lengths are assumed
DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SHAPES = Path(__file__).resolve().parents[3] / "configs" / "models"  # of a source tree


@dataclasses.dataclass(frozen=True)
class Case:
    """An edit that is planned."""

    spec: ModelSpec
    config: Config
    dtype: np.dtype  # of activations, and of the frozen weights unless these are int8
    int8: bool
    site: tuple[str, ...]
    corpus: Corpus  # the edits' texts, or some of the same lengths
    edits: int  # in all

    @property
    def layer(self) -> int:
        return first_layer(self.spec, self.site)

    @property
    def tokens(self) -> int:
        """Of all edits."""
        return round(self.edits * len(self.corpus.tokens) / self.corpus.edits)


def make_case(config: Config, model_config: Path | None = None) -> tuple[Case, list[str]]:
    """What the config edits, and notes on what had to be assumed. `model_config`: the model's config.json.

    Raises UserError for a model of which no config.json is here, and where the edit itself would.
    """
    if model_config is not None and not model_config.exists():
        raise UserError(f"--model-config: no file {str(model_config)!r}")
    path = model_config or find_shape(config)
    values, notes = read_config(path), []
    spec = parse_spec(values, str(path))
    folder = open_folder(str(path)) if path.is_dir() and any(path.glob("*.safetensors")) else None
    named = str(values.get("dtype") or values.get("torch_dtype"))
    stored = folder.dtype if folder else DTYPES.get(named, ml_dtypes.bfloat16)
    dtype = np.dtype(stored if config.weights in ("checkpoint", "int8") else DTYPES[config.weights])
    here = config.data_path if config.data_path and Path(config.data_path).is_file() else None
    if here and folder:
        base = Base(spec, folder, TextEncoder(load_tokenizer(folder)))
        prepared = prepare(dataclasses.replace(config, evaluate=False, eval_every=None), base=base)
        site, corpus, edits = prepared.site, prepared.corpus, len(prepared.data.requests)
        assert corpus is not None
    else:
        site = choose_site(spec, config)
        check_preserve(spec, site, config)
        edits = config.num_edits or EDITS
        if here:
            edits = len(read_requests(here, config.num_edits, config.on_conflict).requests)
        corpus = assumed_corpus(min(edits, SAMPLE))
        mean, most = corpus.lengths.mean(), corpus.lengths.max()
        notes.append(
            f"lengths are assumed, as in ZsRE: {mean:.1f} tokens an edit with target and EOS, {most} at "
            "most; a data file and a folder with the tokenizer here would give the real ones"
        )
    return Case(spec, config, dtype, config.weights == "int8", site, corpus, edits), notes


def find_shape(config: Config) -> Path:
    """The folder or file that says what the config's model is: itself where it is here, else NAME.json in
    models/ beside the config, or in configs/models/ of this source tree.

    Raises UserError where there is none.
    """
    given = Path(os.path.expanduser(config.model_name_or_path))
    name = f"{given.name}.json"
    places = [Path(config.source).parent / "models" / name] if config.source else []
    for path in (given, *places, SHAPES / name):
        if (path / "config.json").is_file() or (path.is_file() and path.suffix == ".json"):
            return path
    raise UserError(
        f"model_name_or_path: no config.json of {config.model_name_or_path!r} is here, and a plan downloads "
        "nothing; give the file with --model-config FILE, or a folder with "
        "--set model_name_or_path=FOLDER"
    )


def assumed_corpus(edits: int, seed: int = 0) -> Corpus:
    """Texts of ZsRE-like lengths: prompts of 6 to 32 tokens (mean 15), targets of 1 to 16 (mean 4), EOS."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(np.round(rng.gamma(9.0, 15 / 9, edits)), 6, 32).astype(int)
    targets = np.clip(np.round(rng.gamma(2.2, 4 / 2.2, edits)), 1, 16).astype(int)
    return corpus_from_lists([np.zeros(n, np.int32) for n in prompts + targets + 1], prompts)
