"""Ids on their way through data loaders and the Trainer."""

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, default_collate

from wtacrs_fx import Backend, SampleIdsCollator, SampleIdsTrainer, SampleNorms, WithSampleIds

from helpers import SMALL

EXAMPLES = [{"x": torch.full((6, 16), float(i)), "labels": i % 2} for i in range(12)]


def test_data_loader():
    data = WithSampleIds(EXAMPLES)
    assert len(data) == 12
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(data, 4, shuffle=True, collate_fn=SampleIdsCollator(default_collate), generator=generator)
    for batch in loader:
        assert batch["sample_ids"] == [int(x[0, 0]) for x in batch["x"]]
        assert batch["labels"].shape == (4,)
    with pytest.raises(KeyError, match=r"WithSampleIds\(dataset\)"):
        SampleIdsCollator(default_collate)(EXAMPLES[:2])


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x, labels=None):
        logits = self.out(self.body(x).tanh().mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_trainer(tmp_path):
    """transformers' own, with the columns that it does not know dropped: ids reach the cache and not the model."""

    class Trainer(SampleIdsTrainer, transformers.Trainer):
        pass

    model, source = Classifier(), SampleNorms(examples=12)
    model.compile(backend=Backend(norms=source, late="exact", inner="eager", **SMALL))
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=3,
        per_device_eval_batch_size=4,
        max_steps=2,
        report_to=[],
        use_cpu=True,
    )
    data = WithSampleIds([{**e, "text": "not for the model"} for e in EXAMPLES])
    trainer = Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, data_collator=SampleIdsCollator(default_collate)
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    (table,) = (t.data for site, t in source.tables.items() if site.startswith("body"))
    assert int((table[:, 0] >= 0).sum()) == 6, "two batches of three examples were seen"
