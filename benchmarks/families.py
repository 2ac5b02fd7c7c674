"""Small members of four transformer families, built from transformers' config classes with random weights.

Memory and time do not depend on the weights, so nothing is downloaded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]

VOCABULARY = 4096
"""Small, so that the logits do not drown the layers."""


def bert(layers: int, batch: int, length: int) -> tuple[nn.Module, Batch]:
    """BERT-base blocks (hidden 768, GELU, dropout 0.1) with a classification head."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(num_hidden_layers=layers, vocab_size=VOCABULARY)
    ids = torch.randint(0, VOCABULARY, (batch, length))
    return BertForSequenceClassification(config), {"input_ids": ids, "labels": torch.randint(0, 2, (batch,))}


def gpt2(layers: int, batch: int, length: int) -> tuple[nn.Module, Batch]:
    """GPT-2 blocks (hidden 768, Conv1D, tanh GELU, dropout 0.1), next-token loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_layer=layers, vocab_size=VOCABULARY, use_cache=False, bos_token_id=0, eos_token_id=0)
    )
    model.loss_type = "ForCausalLM"  # (found from the class's name it is None: a warning, and that breaks the graph)
    return model, _causal(batch, length)


def t5(layers: int, batch: int, length: int) -> tuple[nn.Module, Batch]:
    """T5 blocks (hidden 512, ReLU, explicit attention, dropout 0.1), half of the layers in each stack."""
    from transformers import T5Config, T5ForConditionalGeneration

    half = max(1, layers // 2)
    config: Any = T5Config(num_layers=half, num_decoder_layers=half, vocab_size=VOCABULARY, use_cache=False)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config), _causal(batch, length)


def llama(layers: int, batch: int, length: int) -> tuple[nn.Module, Batch]:
    """Llama blocks in the proportions of Llama 3.2 1B (SwiGLU 4x, grouped-query attention 4:1), hidden 768, no dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return LlamaForCausalLM(config), _causal(batch, length)


FAMILIES: dict[str, Callable[[int, int, int], tuple[nn.Module, Batch]]] = {
    "bert": bert,
    "gpt2": gpt2,
    "t5": t5,
    "llama": llama,
}


def _causal(batch: int, length: int) -> Batch:
    ids = torch.randint(0, VOCABULARY, (batch, length))
    return {"input_ids": ids, "labels": ids.clone()}
