"""Further training texts of an edit: its prompt after random texts (the paper's "random prefixes", Table 7)
and rephrases that were given. The texts of one edit share its weight in the loss and its place in a batch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from locft_jax.config import Config
from locft_jax.data.requests import EditRequest
from locft_jax.editing.regularizers.texts import sample_model
from locft_jax.errors import UserError
from locft_jax.model.model import Model

POOL = 64  # texts that the model writes; every edit draws its own from them
TOKENS = 10  # of each of them, at most
STAND_IN = " ".join(["the"] * TOKENS)  # as long as a text that the model has not written yet


def prefix_texts(config: Config) -> list[str]:
    """The random texts of a run: the lines of `augment_data`; without it stand-ins of the same length for
    those that the model will write (`written_prefixes`); none where none are wanted. Raises UserError for a
    file that cannot be read or holds fewer texts than one edit needs."""
    if not config.augment_prefixes:
        return []
    if config.augment_data is None:
        return [STAND_IN] * config.augment_prefixes
    try:
        lines = Path(config.augment_data).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"augment_data: {config.augment_data} cannot be read as UTF-8 text ({e})") from None
    texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(texts) < config.augment_prefixes:
        raise UserError(
            f"augment_data: {config.augment_data} holds {len(texts)} different texts (one a line), "
            f"augment_prefixes={config.augment_prefixes} needs at least as many"
        )
    return texts


def written_prefixes(model: Model, config: Config) -> list[str]:
    """`prefix_texts` where the model may be asked: seeded beginnings of its own texts, each closed with a
    full stop. Raises UserError where it writes too few different ones."""
    if not config.augment_prefixes or config.augment_data is not None:
        return prefix_texts(config)
    count = max(POOL, 4 * config.augment_prefixes)
    sampled = sample_model(model, config.seed, count, TOKENS)
    texts = (model.tokenizer.decode(ids, skip_special_tokens=True) for ids in sampled)
    folded = (" ".join(text.split()).rstrip(" .,;:") for text in texts)
    found = list(dict.fromkeys(text + "." for text in folded if text))
    if len(found) < config.augment_prefixes:
        raise UserError(
            f"augment_prefixes: the model writes only {len(found)} different texts of its own; "
            "give a file of texts with augment_data"
        )
    return found


def training_prompts(
    requests: Sequence[EditRequest], config: Config, prefixes: Sequence[str]
) -> list[list[str]]:
    """Every edit's prompts: its own, the first `augment_rephrases` of its rephrases, and its own after
    `augment_prefixes` different texts of `prefixes`, drawn with the config's seed."""
    rng = np.random.default_rng([config.seed, config.augment_prefixes])

    def drawn() -> list[str]:
        if not config.augment_prefixes:
            return []
        return [prefixes[i] for i in rng.choice(len(prefixes), config.augment_prefixes, replace=False)]

    return [
        [r.prompt, *r.rephrases[: config.augment_rephrases], *(f"{p} {r.prompt}" for p in drawn())]
        for r in requests
    ]
