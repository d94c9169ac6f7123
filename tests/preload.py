"""What processes forked for a test need not import again; torch is hidden, which transformers would load."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]

import orbax.checkpoint  # noqa: E402, F401
import transformers  # noqa: E402

import locft_jax.cli.edit  # noqa: E402
import locft_jax.cli.evaluate  # noqa: E402
import locft_jax.cli.locate  # noqa: E402
import locft_jax.cli.sweep  # noqa: E402

transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast  # noqa: B018 (they are loaded when named)
locft_jax.cli.edit, locft_jax.cli.evaluate, locft_jax.cli.locate, locft_jax.cli.sweep  # noqa: B018
