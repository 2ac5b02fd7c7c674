"""Hugging Face: architectures, peft, the Trainer, and a callback for its logs."""

import json
import os
import warnings
from collections import deque

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from wtacrs_fx import Backend, backend
from wtacrs_fx.huggingface import WtacrsCallback
from wtacrs_fx.ledger import Ledger

from helpers import LLAMA, SIZE, SMALL, gradients

KEEP_ALL = {"ratio": 0.9999, "inner": "eager", **SMALL}


ARCHITECTURES = ("BERT", "RoBERTa", "T5", "GPT-2", "OPT", "Llama", "Qwen2", "ViT", "Whisper", "Mixtral")
FAST = ("BERT", "Llama", "Mixtral")
"""Those that every run of the suite tries."""
REST = ((False, 0.0), (True, 0.0))


def ids(batch=4, length=12):
    return torch.randint(1, 64, (batch, length))


def text(labels=False):
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[0, 8:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens if labels else torch.randint(0, 2, (4,))}


def build(name):
    """(model, batch) of an architecture in a size that compiles in a second."""
    t = transformers
    if name == "BERT":
        return t.BertForSequenceClassification(t.BertConfig(**SIZE)), text()
    if name == "RoBERTa":
        return t.RobertaForSequenceClassification(t.RobertaConfig(**SIZE, max_position_embeddings=64)), text()
    if name == "T5":
        config = t.T5Config(
            vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        return t.T5ForConditionalGeneration(config), text(labels=True)
    if name == "GPT-2":
        config = t.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64, use_cache=False)
        return t.GPT2LMHeadModel(config), text(labels=True)
    if name == "OPT":
        config = t.OPTConfig(
            **{k: v for k, v in SIZE.items() if k != "intermediate_size"},
            ffn_dim=64,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            use_cache=False,
        )
        return t.OPTForCausalLM(config), text(labels=True)
    if name in ("Llama", "Qwen2"):
        kind = t.LlamaConfig if name == "Llama" else t.Qwen2Config
        return t.AutoModelForCausalLM.from_config(kind(**LLAMA, use_cache=False)), text(labels=True)
    if name == "ViT":
        config = t.ViTConfig(**{k: v for k, v in SIZE.items() if k != "vocab_size"}, image_size=16, patch_size=4)
        return t.ViTForImageClassification(config), {
            "pixel_values": torch.randn(4, 3, 16, 16),
            "labels": torch.randint(0, 2, (4,)),
        }
    if name == "Whisper":
        config = t.WhisperConfig(
            vocab_size=64,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=10,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            use_cache=False,
        )
        return t.WhisperForConditionalGeneration(config), {"input_features": torch.randn(4, 8, 20), "labels": ids()}
    config = t.MixtralConfig(**LLAMA, num_local_experts=2, num_experts_per_tok=1, use_cache=False)
    return t.MixtralForCausalLM(config), text(labels=True)


def train(model, batch, backend, steps=3):
    """Losses of a few steps, with dropout off."""
    model.eval()
    compiled = torch.compile(model, backend=backend) if backend else model
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        loss = compiled(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.works_with(
    "Hugging Face", "BERT, RoBERTa, T5, GPT-2, OPT, Llama, Qwen2, ViT, Whisper, Mixtral", "yes; experts exact"
)
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.long) for n in ARCHITECTURES])
def test_architectures(name):
    torch.manual_seed(0)
    model, batch = build(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    exact = train(model, batch, None)
    model.load_state_dict(state)
    backend = Backend(**KEEP_ALL)
    torch.testing.assert_close(train(model, batch, backend), exact, rtol=2e-4, atol=2e-4)
    sampled = [e.module for x in backend.ledgers for e in x.entries if e.decision != "exact"]
    assert len(sampled) >= 3
    if name == "Mixtral":
        assert not any("experts" in m for m in sampled)


@pytest.mark.works_with(
    "Hugging Face", "peft: LoRA, DoRA, `lora_dropout`", "yes; wide adapters' inputs are sampled, narrow ones' exact"
)
@pytest.mark.parametrize(
    ("dora", "dropout"), [(False, 0.05), *(pytest.param(*x, marks=pytest.mark.long) for x in REST)]
)
def test_peft(dora, dropout):
    torch.manual_seed(0)
    model, batch = build("Llama")
    config = LoraConfig(r=8, lora_dropout=dropout, use_dora=dora, target_modules=["q_proj", "up_proj", "down_proj"])
    model = get_peft_model(model, config)
    warnings.filterwarnings("ignore", message=".*it has no weight-gradient product")  # DoRA's norms break the graph
    for n, p in model.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.1)
    found = []
    for ratio in (1.0, 0.9999):  # both compiled, from one seed: the same masks of dropout
        torch._dynamo.reset()
        torch.manual_seed(1)
        backend = Backend(**{**KEEP_ALL, "ratio": ratio})
        compiled = torch.compile(model, backend=backend)
        found.append(gradients(model, call=lambda f=compiled: f(**batch).loss))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)
    assert dora or all("lora" in e.module for x in backend.ledgers for e in x.entries), (
        "only adapters have weight gradients"
    )
    assert any(e.decision != "exact" for x in backend.ledgers for e in x.entries)


class Items(torch.utils.data.Dataset):
    """A toy task: is the first token of the upper half?"""

    def __init__(self, n=48):
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, 64, (n, 12), generator=g)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": (self.ids[i, 0] >= 32).long()}


def trainer(folder, steps, compiled=True):
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZE))
    if compiled:
        model.compile(backend="wtacrs", options={**SMALL, "inner": "eager", "ratio": 0.5})
    args = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        logging_steps=1,
        use_cpu=True,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        report_to=[],
        disable_tqdm=True,
        seed=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
    )
    return transformers.Trainer(
        model, args, train_dataset=Items(), eval_dataset=Items(16), callbacks=[WtacrsCallback()]
    )


@pytest.mark.works_with(
    "Hugging Face",
    'Trainer: train, evaluate, save by `model.compile(backend="wtacrs")`',
    "yes; checkpoints are those of the plain model",
)
@pytest.mark.works_with("Hugging Face", "`WtacrsCallback`", "bytes held and measured memory in the Trainer's logs")
def test_trainer(tmp_path, monkeypatch):
    full = deque((Ledger((), 0, 0) for _ in range(8)), maxlen=8)  # as in a process that has compiled many graphs
    monkeypatch.setattr(backend, "_ledgers", full)
    ours = trainer(tmp_path, 2)
    ours.train()
    assert ours.evaluate()["eval_loss"] > 0
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert not any("_orig_mod" in name for name in saved)
    assert saved.keys() == ours.model.state_dict().keys()
    transformers.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    logs = [x for x in ours.state.log_history if "loss" in x]
    assert logs[-1]["wtacrs_sites_sampled"] >= 6
    assert 0 < logs[-1]["wtacrs_saved_mib"] < logs[-1]["wtacrs_saved_exact_mib"]
    assert logs[-1]["wtacrs_peak_mib"] > 10
    json.dumps(logs)


@pytest.mark.long
@pytest.mark.works_with(
    "Hugging Face", "Trainer: resume from a checkpoint", "yes, bit by bit: draws follow the saved state"
)
def test_trainer_resumes(tmp_path):
    whole = trainer(tmp_path / "a", 4)
    whole.train()
    torch._dynamo.reset()
    trainer(tmp_path / "b", 2).train()
    torch._dynamo.reset()
    resumed = trainer(tmp_path / "b", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=0, msg=name)


@pytest.mark.works_with(
    "Hugging Face",
    '`TrainingArguments(torch_compile_backend="wtacrs")`',
    "no: accelerate knows a fixed list; use `model.compile`",
)
def test_training_arguments_refuse_the_name(tmp_path):
    before = dict(os.environ)
    args = transformers.TrainingArguments(
        str(tmp_path), torch_compile=True, torch_compile_backend="wtacrs", use_cpu=True, report_to=[]
    )
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZE))
    try:
        with pytest.raises(ValueError, match="not a valid DynamoBackend"):
            transformers.Trainer(model, args, train_dataset=Items())
    finally:  # the arguments have set variables for accelerate
        for name in set(os.environ) - set(before):
            del os.environ[name]


class Pairs(nn.Module):
    """Sentence pairs, each other pair of the batch a negative (InfoNCE): the loss couples all examples of a batch."""

    def __init__(self):
        super().__init__()
        self.encoder = transformers.BertModel(transformers.BertConfig(**SIZE), add_pooling_layer=False)

    def forward(self, a, b):
        a, b = (nn.functional.normalize(self.encoder(input_ids=x).last_hidden_state.mean(1), dim=-1) for x in (a, b))
        return nn.functional.cross_entropy(a @ b.T / 0.05, torch.arange(len(a)))


@pytest.mark.long
@pytest.mark.works_with(
    "Hugging Face",
    "sentence pairs with in-batch negatives",
    "yes; the encoder's two calls draw apart, biases' gradients exact",
)
def test_contrastive_pairs():
    torch.manual_seed(0)
    model = Pairs()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = ids(8, 12), ids(8, 12)
    exact = gradients(model, *batch)
    torch.testing.assert_close(
        gradients(model, *batch, call=torch.compile(model, backend=Backend(**KEEP_ALL))), exact, rtol=1e-3, atol=1e-5
    )
    torch._dynamo.reset()
    half = gradients(model, *batch, call=torch.compile(model, backend=Backend(**{**KEEP_ALL, "ratio": 0.5})))
    name = "encoder.encoder.layer.0.intermediate.dense"
    torch.testing.assert_close(half[f"{name}.bias"], exact[f"{name}.bias"], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(half[f"{name}.weight"], exact[f"{name}.weight"], rtol=1e-2)
