"""Models to report on: built from transformers' config classes, or from a config.json, without weights and without a hub."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wtacrs_fx.errors import ReportError

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Preset:
    """A published model: its type in transformers, what differs from the defaults of its config class, and its usual task."""

    model_type: str
    task: str
    config: Mapping[str, Any]


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool) -> Mapping[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
    }


def _t5(width: int, kv: int, inner: int, layers: int, heads: int) -> Mapping[str, Any]:
    return {"d_model": width, "d_kv": kv, "d_ff": inner, "num_layers": layers, "num_heads": heads}


_BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_OPT = {
    "hidden_size": 2048,
    "ffn_dim": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "word_embed_proj_dim": 2048,
}
_QWEN = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
_WHISPER = {
    "d_model": 768,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
}

PRESETS = {
    "bert-base": Preset("bert", "classification", {}),
    "bert-large": Preset("bert", "classification", _BERT_LARGE),
    "t5-base": Preset("t5", "seq2seq", _t5(768, 64, 3072, 12, 12)),
    "t5-large": Preset("t5", "seq2seq", _t5(1024, 64, 4096, 24, 16)),
    "t5-3b": Preset("t5", "seq2seq", _t5(1024, 128, 16384, 24, 32)),
    "opt-1.3b": Preset("opt", "causal-lm", _OPT),
    "gpt2": Preset("gpt2", "causal-lm", {}),
    "gpt2-xl": Preset("gpt2", "causal-lm", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama-3.2-1b": Preset("llama", "causal-lm", _llama(2048, 8192, 16, 32, 8, tied=True)),
    "llama-3-8b": Preset("llama", "causal-lm", _llama(4096, 14336, 32, 32, 8, tied=False)),
    "qwen2.5-7b": Preset("qwen2", "causal-lm", _QWEN),
    "vit-base": Preset("vit", "image", {}),
    "whisper-small": Preset("whisper", "speech", _WHISPER),
}


@dataclass(frozen=True)
class Task:
    """A class of transformers that makes the model for a task, and its batch."""

    auto_class: str
    batch: Callable[[Any, int, int], Batch]
    """(config, batch size, length) -> batch."""


def _ids(below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape)


TASKS = {
    "classification": Task(
        "AutoModelForSequenceClassification",
        lambda c, b, n: {"input_ids": _ids(c.vocab_size, b, n), "labels": _ids(c.num_labels, b)},
    ),
    "causal-lm": Task(
        "AutoModelForCausalLM",
        lambda c, b, n: {"input_ids": _ids(c.vocab_size, b, n), "labels": _ids(c.vocab_size, b, n)},
    ),
    "seq2seq": Task(
        "AutoModelForSeq2SeqLM",
        lambda c, b, n: {"input_ids": _ids(c.vocab_size, b, n), "labels": _ids(c.vocab_size, b, n)},
    ),
    "image": Task(
        "AutoModelForImageClassification",
        lambda c, b, n: {
            "pixel_values": torch.randn(b, c.num_channels, c.image_size, c.image_size),
            "labels": _ids(c.num_labels, b),
        },
    ),
    "speech": Task(
        "AutoModelForSpeechSeq2Seq",
        lambda c, b, n: {
            "input_features": torch.randn(b, c.num_mel_bins, 2 * c.max_source_positions),
            "labels": _ids(c.vocab_size, b, n),
        },
    ),
}


def build(
    name: str,
    *,
    batch_size: int,
    length: int,
    task: str | None = None,
    dtype: torch.dtype = torch.float32,
    lora: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str = "meta",
) -> tuple[nn.Module, Batch]:
    """A model to train and a batch.

    Args:
        name: a key of :data:`PRESETS`, or the path of a transformers config.json (or of the folder it is in).
        batch_size, length: examples, and tokens of each (of the labels of a speech model; an image model has none).
        task: a key of :data:`TASKS`; None: the preset's own, or the one of the config's ``architectures``.
        dtype: of the parameters and of floating-point inputs.
        lora: arguments of peft's ``LoraConfig`` such as ``{"r": 32}``; only the adapters are trained, and
            what its ``modules_to_save`` names.
        overrides: fields of the config to change, for example the number of layers.
        device: "meta": tensors without memory, which is all that a report needs.

    Raises:
        ReportError: an unknown preset or task, a config that transformers cannot read, a missing package.
    """
    try:
        import transformers
    except ImportError as error:
        raise ReportError('presets and config files need transformers: pip install "wtacrs-fx[hf]"') from error

    config, usual = _config(name, dict(overrides or {}))
    task = task or usual
    if task not in TASKS:
        raise ReportError(f"task={task!r}: expected one of {', '.join(TASKS)}.")
    auto_class = getattr(transformers, TASKS[task].auto_class)
    with torch.device(device):
        try:
            model = auto_class.from_config(config)
        except ValueError as error:
            raise ReportError(f"{name} has no model for task {task!r}: {str(error).splitlines()[0]}") from error
        if task != "image":
            _check_length(name, model, config, length)
        model = _with_adapters(model, lora) if lora else model
        batch = TASKS[task].batch(config, batch_size, length)
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        return model.to(dtype).train(), batch


def _config(name: str, overrides: dict[str, Any]) -> tuple[Any, str | None]:
    """The config, and the usual task."""
    import transformers

    if name in PRESETS:
        preset = PRESETS[name]
        values, model_type = {**preset.config, **overrides}, preset.model_type
        task: str | None = preset.task
    else:
        path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
        if not path.exists():
            raise ReportError(f"{name!r} is neither a preset nor a config file. Presets: {', '.join(PRESETS)}.")
        try:
            values = {**json.loads(path.read_text()), **overrides}
            model_type = values.pop("model_type")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ReportError(
                f"{path}: expected a transformers config.json, a JSON object with a 'model_type' ({error})."
            ) from error
        task = _task_of(values.get("architectures") or ())
    try:
        config = transformers.AutoConfig.for_model(model_type, **values)
    except Exception as error:  # (transformers has classes of its own for values of the wrong type)
        first = " ".join(
            str(error).partition(" Should contain one of")[0].split()
        )  # (all of its several hundred types)
        raise ReportError(f"{name}: transformers {transformers.__version__} cannot read it: {first}") from error
    config.use_cache = False
    for field in ("pad_token_id", "decoder_start_token_id"):
        if getattr(config, field, None) is None:
            setattr(config, field, 0)
    return config, task


def _check_length(name: str, model: nn.Module, config: Any, length: int) -> None:
    """Refuse sequences that are longer than the table of learned positions: an index out of range is no error without data."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    tables = (n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Embedding))
    if limit and length > limit and any("position" in table or table == "wpe" for table in tables):
        raise ReportError(
            f"{length} tokens: {name} has learned positions for {limit}. Take at most so many (--seq-len)."
        )


def _task_of(architectures: "list[str] | tuple[str, ...]") -> str | None:
    endings = {
        "ForSequenceClassification": "classification",
        "ForCausalLM": "causal-lm",
        "LMHeadModel": "causal-lm",
        "ForImageClassification": "image",
        "ForSpeechSeq2Seq": "speech",
        "ForConditionalGeneration": "seq2seq",
    }
    return next((task for a in architectures for end, task in endings.items() if a.endswith(end)), None)


def _with_adapters(model: nn.Module, lora: Mapping[str, Any]) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ReportError('LoRA needs peft: pip install "wtacrs-fx[hf]"') from error
    try:
        adapted: nn.Module = get_peft_model(model, LoraConfig(**lora))
    except (TypeError, ValueError) as error:
        raise ReportError(f"lora={dict(lora)!r}: {error}") from error
    return adapted
