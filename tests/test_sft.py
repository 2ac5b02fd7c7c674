"""Supervised fine-tuning of a causal LM with the Trainer: prompts without loss, batches of changing length."""

import pytest
import torch
import transformers

from wtacrs_fx import Backend

from helpers import LLAMA, SMALL

CONFIG = transformers.LlamaConfig(**LLAMA, use_cache=False)


def conversations(n=24):
    """Prompts and answers of 2 to 8 tokens each; the loss is about the answers."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (n, 2), generator=g).tolist()
    tokens = [torch.randint(1, 64, (sum(pair),), generator=g).tolist() for pair in lengths]
    return [{"input_ids": x, "labels": [-100] * prompt + x[prompt:]} for x, (prompt, _) in zip(tokens, lengths)]


def padded(items):
    """A batch as long as its longest conversation."""
    length = max(len(x["input_ids"]) for x in items)

    def pad(rows, value):
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    tokens, labels = ([x[name] for x in items] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad(tokens, 0),
        "labels": pad(labels, -100),
        "attention_mask": pad([[1] * len(row) for row in tokens], 0),
    }


@pytest.mark.works_with(
    "Hugging Face",
    "Trainer: SFT of a causal LM (prompts without loss, padded, accumulated)",
    "yes; one graph with `dynamic=True`",
)
def test_sft_of_a_causal_lm(tmp_path):
    trained, backend = [], Backend(**{"ratio": 0.9999, "inner": "eager", **SMALL})
    for compiled in (False, True):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIG)
        if compiled:
            model.compile(backend=backend, dynamic=True)
        args = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=5,
            per_device_train_batch_size=5,  # the last batch of an epoch has 4
            gradient_accumulation_steps=2,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            optim="sgd",
            learning_rate=0.3,
        )
        start = model.lm_head.weight.detach().clone()
        transformers.Trainer(model, args, train_dataset=conversations(), data_collator=padded).train()
        trained.append({n: p.detach() for n, p in model.named_parameters()})
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-3, atol=1e-4)
    assert (trained[1]["lm_head.weight"] - start).norm() > 0.1 * start.norm()
    assert len(backend.ledgers) == 1, "few compilations"
    kept = {e.module.rpartition(".")[2]: e.kept for e in backend.ledger.entries if e.decision != "exact"}
    assert {"q_proj", "up_proj", "down_proj"} <= kept.keys()
    assert isinstance(kept["up_proj"], str), "a share of a symbol"
