"""What a model is: `config.json` -> `ModelSpec`, a frozen, hashable set of sizes and switches.

One decoder serves Llama, Mistral, Qwen2/2.5 and Qwen3; they differ by the booleans here. A config
key that is neither handled nor known to be harmless is an error, never silently ignored.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locft_jax.errors import UserError

FULL_ATTENTION = 2**30  # a window no text reaches
MOST_LAYERS = 10_000  # of any model; more would only exhaust memory before the weights are looked at

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Keys that change nothing in a forward pass at inference, or only restate what others say.
HARMLESS = frozenset(
    "_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path "
    "add_cross_attention architectures attention_dropout attn_implementation auto_map "
    "bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward "
    "cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype "
    "early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty "
    "finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range "
    "is_decoder is_encoder_decoder label2id length_penalty max_length max_position_embeddings "
    "max_window_layers min_length mlp_dropout no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_attentions output_hidden_states output_scores pad_token_id "
    "prefix pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty "
    "resid_pdrop return_dict return_dict_in_generate rope_interleaved sep_token_id "
    "suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder "
    "tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p "
    "use_bfloat16 use_cache use_mrope unsloth_fixed unsloth_version".split()
)
HANDLED = frozenset(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act rms_norm_eps rope_theta rope_scaling rope_parameters "
    "tie_word_embeddings attention_bias mlp_bias sliding_window use_sliding_window layer_types".split()
)

ROPE_HANDLED = frozenset(
    "rope_type type rope_theta factor low_freq_factor high_freq_factor "
    "original_max_position_embeddings".split()
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequency scaling: `linear` uses `factor`; `llama3` uses all (Llama 3.1, appendix)."""

    kind: str  # "linear" | "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Sizes (in elements) and switches of one decoder; static under `jax.jit`."""

    family: str
    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    qkv_bias: bool  # Qwen2
    qk_norm: bool  # Qwen3
    windows: tuple[int, ...]  # tokens a position attends to in each layer; FULL_ATTENTION = all
    max_position: int

    @property
    def sliding(self) -> bool:
        return any(w < FULL_ATTENTION for w in self.windows)


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model folder (or a path to a .json file itself).

    Raises UserError when it is missing or not a JSON object.
    """
    path = folder if folder.is_file() else folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror}); a model folder needs a config.json"
        ) from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({str(e)[:200]})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def parse_spec(config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """`config.json` values -> ModelSpec. Accepts transformers 4 (`rope_theta`, `rope_scaling`) and
    5 (`rope_parameters`) spellings.

    Raises UserError for a model that is not supported (naming all keys that stand in the way) and
    for a size that is missing or malformed.
    """
    family = config.get("model_type")
    if family not in list(FAMILIES):
        raise UserError(f"{where}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    unknown = sorted(set(config) - HARMLESS - HANDLED)
    if unknown:
        raise UserError(
            f"{where}: keys this program does not handle, so the model could come out wrong: "
            + ", ".join(unknown)
        )
    heads = _size(config, "num_attention_heads", where)
    d_model = _size(config, "hidden_size", where)
    head_dim = config.get("head_dim") or d_model // heads
    spec = ModelSpec(
        family=family,
        vocab_size=_size(config, "vocab_size", where),
        d_model=d_model,
        d_ff=_size(config, "intermediate_size", where),
        n_layers=_layers(config, where),
        n_heads=heads,
        n_kv_heads=_size(config, "num_key_value_heads", where, heads),
        head_dim=_size({"head_dim": head_dim}, "head_dim", where),
        rms_eps=_number(config, "rms_norm_eps", where, 1e-6),
        rope_theta=_rope_theta(config, where),
        rope_scaling=_rope_scaling(config, where),
        # Absent means tied for none of these but old Qwen2 files, which state it.
        tie_embeddings=_switch(config, "tie_word_embeddings", where),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        windows=_windows(config, family, where),
        max_position=_size(config, "max_position_embeddings", where, 2048),
    )
    _check(config, spec, where)
    return spec


def eos_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """Token ids that end a generation: those of both files, as transformers' `generate` reads them."""
    found: set[int] = set()
    for source in (config, generation_config):
        value = source.get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        found.update(v for v in values if type(v) is int and v >= 0)
    return tuple(sorted(found))


def _size(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise UserError(f"{where}: {key} must be a positive whole number, found {value!r}")
    return value


def _layers(config: Mapping[str, Any], where: str) -> int:
    layers = _size(config, "num_hidden_layers", where)
    if layers > MOST_LAYERS:
        raise UserError(f"{where}: num_hidden_layers must be at most {MOST_LAYERS}, found {layers}")
    return layers


def _switch(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key)
    if value not in (None, False, True):
        raise UserError(f"{where}: {key} must be true or false, found {value!r}")
    return bool(value)


def _number(config: Mapping[str, Any], key: str, where: str, default: float) -> float:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
        raise UserError(f"{where}: {key} must be a positive number, found {value!r}")
    return float(value)


def _rope(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        raise UserError(f"{where}: rope settings must be one flat object, found {str(rope)[:120]}")
    return rope


def _rope_theta(config: Mapping[str, Any], where: str) -> float:
    rope = _rope(config, where)
    return _number({**config, **rope}, "rope_theta", where, 10000.0)


def _rope_scaling(config: Mapping[str, Any], where: str) -> RopeScaling | None:
    rope = _rope(config, where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported: default, linear, llama3")
    unknown = sorted(set(rope) - ROPE_HANDLED)
    if unknown:
        raise UserError(f"{where}: rope settings this program does not handle: {', '.join(unknown)}")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", _number(rope, "factor", where, 1.0))
    low, high = _number(rope, "low_freq_factor", where, 1.0), _number(rope, "high_freq_factor", where, 4.0)
    if low >= high:
        raise UserError(
            f"{where}: low_freq_factor must be less than high_freq_factor, found {low} and {high}"
        )
    return RopeScaling(
        "llama3",
        _number(rope, "factor", where, 8.0),
        low,
        high,
        _size(rope, "original_max_position_embeddings", where, 8192),
    )


def _windows(config: Mapping[str, Any], family: str, where: str) -> tuple[int, ...]:
    """Attention window per layer. Mistral: every layer; Qwen: from layer `max_window_layers` on,
    if `use_sliding_window`; `layer_types`, where present, decides."""
    layers = _layers(config, where)
    window = config.get("sliding_window")
    if family.startswith("qwen") and not _switch(config, "use_sliding_window", where):
        window = None
    if window is None or family == "llama":
        return (FULL_ATTENTION,) * layers
    size = _size(config, "sliding_window", where)
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28) if family.startswith("qwen") else 0
        if not isinstance(first, int):
            raise UserError(f"{where}: max_window_layers must be a whole number, found {first!r}")
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    known = {"sliding_attention": size, "full_attention": FULL_ATTENTION}
    if not isinstance(types, list) or len(types) != layers or any(t not in list(known) for t in types):
        raise UserError(f"{where}: layer_types must name sliding_attention or full_attention {layers} times")
    return tuple(known[t] for t in types)


def _check(config: Mapping[str, Any], spec: ModelSpec, where: str) -> None:
    wrong = []
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        wrong.append(f"hidden_act {config['hidden_act']!r} (supported: silu)")
    if config.get("attention_bias"):
        wrong.append("attention_bias true (supported: false)")
    if config.get("mlp_bias"):
        wrong.append("mlp_bias true (supported: false)")
    if spec.n_heads % spec.n_kv_heads:
        wrong.append(
            f"num_attention_heads {spec.n_heads} not divisible by num_key_value_heads {spec.n_kv_heads}"
        )
    if spec.head_dim % 2:
        wrong.append(f"head_dim {spec.head_dim} is odd, rotary embeddings need it even")
    if wrong:
        raise UserError(f"{where}: not supported: " + "; ".join(wrong))
