"""Every preset's small sibling: two layers, small hidden sizes."""

from typing import Any

from torch import nn

from wtacrs_fx.presets import PRESETS, Batch, build

_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
_BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bert": {**_BERT, "vocab_size": 96},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 96},
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 64,
        "vocab_size": 96,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0},
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "vit": {**_BERT, "image_size": 32, "patch_size": 8},
    "whisper": {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "vocab_size": 96,
        "max_source_positions": 20,
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
}


def small(preset: str, **kwargs: Any) -> tuple[nn.Module, Batch]:
    """The preset's sibling with 4 examples of 16 tokens."""
    return build(preset, batch_size=4, length=16, overrides=OVERRIDES[PRESETS[preset].model_type], **kwargs)
