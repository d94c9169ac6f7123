"""All regularizers of a run behind one function: the number of a mini-batch -> what its step is given."""

from collections.abc import Callable, Sequence

from locft_jax import distributed
from locft_jax.config import Config
from locft_jax.editing.regularizers.kl import retain_batches
from locft_jax.editing.regularizers.preconditioner import Lambdas, make_preconditioner
from locft_jax.editing.step import Regularizers
from locft_jax.io.hf_load import originals
from locft_jax.model.activation_cache import Source
from locft_jax.model.memory import memory_budgets
from locft_jax.model.model import Model


def make_regularizers(
    model: Model, site: Sequence[str], source: Source, config: Config, retained: Sequence[Sequence[int]]
) -> tuple[Callable[[int], Regularizers], Lambdas]:
    """(mini-batch number -> `Regularizers`, the lambdas of `preserve`). `source`: the edits' own; `retained`:
    token ids of the retained texts."""
    sides, lambdas = make_preconditioner(model, site, config, retained)
    base = model.with_overrides(originals(model, site)).params
    device, host = distributed.least(*memory_budgets(config.memory_budget))
    retain = retain_batches(model, base, source, config, retained, (device, host))
    return lambda visit: Regularizers(sides, retain(visit)), lambdas
