"""Tokenizers of the kinds in use, small enough to reason about: any merges, across any boundary."""

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?.,!"


def wrap(backend, **options):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options
    )


def bpe(merges, space):
    """A BPE over letters and a space symbol whose merges may cross anything, as without a pre-tokenizer."""
    from tokenizers import Tokenizer, models

    symbols = ["<unk>", "<s>", "</s>", *LETTERS, space, *("".join(m) for m in merges)]
    vocab = {s: i for i, s in enumerate(dict.fromkeys(symbols))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def byte_level(merges):
    """Byte-level (GPT-2-like) without the regex that keeps merges inside words."""
    from tokenizers import decoders, pre_tokenizers

    backend = bpe(merges, "Ġ")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece(merges):
    """As Llama 2's and Mistral's: a space symbol before every text, BOS."""
    from tokenizers import decoders, normalizers, processors

    backend = bpe(merges, "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def metaspace(merges):
    """As newer conversions of sentencepiece models write it: words are split, each with its symbol."""
    from tokenizers import decoders, pre_tokenizers, processors

    backend = bpe(merges, "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=False)
    backend.decoder = decoders.Metaspace("▁", "always", split=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend
