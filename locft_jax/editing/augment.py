"""Further training texts of an edit: its prompt after random texts (the paper's "random prefixes", Table 7)
and rephrases that were given. The texts of one edit share its weight in the loss and its place in a batch."""

from collections.abc import Iterable, Sequence

import numpy as np

from locft_jax.config import Config
from locft_jax.data.requests import EditRequest
from locft_jax.editing.regularizers.texts import read_lines, sample_model
from locft_jax.errors import UserError
from locft_jax.model.model import Model

POOL = 64  # texts that the model writes; every edit draws its own from them
TOKENS = 10  # of each of them, at most
STAND_IN = " ".join(["the"] * TOKENS)  # as long as a text that the model has not written yet


def prefix_texts(config: Config) -> list[str]:
    """The random texts of a run: the lines of `augment_data`; without it stand-ins of the same length for
    those that the model will write. Raises UserError for a file that cannot be read or holds too few."""
    if config.augment_data is None or not config.augment_prefixes:
        return [STAND_IN] * config.augment_prefixes
    lines = read_lines("augment_data", config.augment_data)
    return _different(lines, config, f"augment_data: {config.augment_data} holds")


def written_prefixes(model: Model, config: Config) -> list[str]:
    """`prefix_texts` where the model is loaded: seeded beginnings of its own texts, each closed with a full
    stop. Raises UserError where it writes too few different ones."""
    if not config.augment_prefixes or config.augment_data is not None:
        return prefix_texts(config)
    sampled = sample_model(model, config.seed, max(POOL, 4 * config.augment_prefixes), TOKENS)
    texts = (model.tokenizer.decode(ids, skip_special_tokens=True) for ids in sampled)
    folded = (" ".join(text.split()).rstrip(" .,;:") for text in texts)
    return _different((text and text + "." for text in folded), config, "augment_data: the model writes")


def _different(texts: Iterable[str], config: Config, what: str) -> list[str]:
    """Every text once. Raises UserError where they are too few for one edit."""
    found = list(dict.fromkeys(text for text in texts if text))
    if len(found) < config.augment_prefixes:
        need = f"augment_prefixes={config.augment_prefixes} needs a file of at least as many"
        raise UserError(f"{what} {len(found)} different texts, {need}")
    return found


def training_prompts(
    requests: Sequence[EditRequest], config: Config, prefixes: Sequence[str]
) -> list[list[str]]:
    """Every edit's prompts: its own, the first `augment_rephrases` of its rephrases, and its own after
    `augment_prefixes` different texts of `prefixes`, drawn with the config's seed."""
    count, rng = config.augment_prefixes, np.random.default_rng([config.seed, config.augment_prefixes])
    drawn = [rng.choice(len(prefixes), count, replace=False) if count else () for _ in requests]
    return [
        [r.prompt, *r.rephrases[: config.augment_rephrases], *(f"{prefixes[i]} {r.prompt}" for i in own)]
        for r, own in zip(requests, drawn, strict=True)
    ]
