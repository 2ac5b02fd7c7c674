"""Rows that the batch's mask calls padding: never kept once it is seen that they have no gradient."""

import warnings

import pytest
import torch
import transformers
from torch import nn

import wtacrs_fx
from wtacrs_fx import Backend, PositionNorms, WtacrsWarning, ledgers
from wtacrs_fx.estimators import ESTIMATORS
from wtacrs_fx.norm_state import RowState
from wtacrs_fx.rng import uniform

from helpers import SMALL, Moments, Transformer, gradients, transformer_batch

EARLY = {**SMALL, "late": "exact", "inner": "eager", "ratio": 0.3, "estimator": "systematic"}


class Masked(Transformer):
    """Keys of padding are not attended to, and padding is not pooled, unless ``leak``: then its first block's output is.
    With ``derived`` the blocks are given a mask that is made of the argument, as Hugging Face's models make one."""

    leak = derived = False

    def forward(self, x, target, attention_mask):
        attention_mask = 1 * attention_mask if self.derived else attention_mask
        for block in self.blocks:
            b, t, d = x.shape
            y = block.ln1(x)
            q, k, v = (f(y).view(b, t, block.heads, -1).transpose(1, 2) for f in (block.q, block.k, block.v))
            scores = (q @ k.transpose(-1, -2) / 4).masked_fill(attention_mask[:, None, None] == 0, -1e9)
            x = x + block.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))
            x = x + block.down(nn.functional.gelu(block.up(block.ln2(x))))
        mask = attention_mask[..., None].to(x.dtype)
        pooled = (x * mask).sum(1) / mask.sum(1)
        loss = nn.functional.cross_entropy(self.classifier(pooled), target)
        return loss + 0.1 * x.square().mean() if self.leak else loss


def masked_batch(share: float = 0.5, batch: int = 8, length: int = 16):
    x, target = transformer_batch(batch, length)
    lengths = (torch.linspace(1 - 1.6 * share, 1, batch) * length).long().clamp(min=1)
    return x, target, (torch.arange(length) < lengths[:, None]).long()


def test_padding_gets_probability_zero_once_it_is_verified():
    model, batch = Masked(), masked_batch()
    exact = gradients(model, *batch)
    assert batch[2].float().mean() < 0.65

    def run(**options):
        torch._dynamo.reset()
        backend = Backend(**EARLY, **options)
        compiled = torch.compile(model, backend=backend)
        gradients(model, *batch, call=compiled)
        moments = Moments()
        error = {}
        for _ in range(60):
            found = gradients(model, *batch, call=compiled)
            moments.add(found)
            for n, g in exact.items():
                error[n] = error.get(n, 0) + float((found[n] - g).square().sum() / g.square().sum().clamp(min=1e-12))
        return backend, moments, error

    backend, moments, error = run(padding="attention_mask")
    _, _, unaware = run()
    sites = {s.partition(":")[0] for s in backend.padding}
    assert len(sites) == 12
    assert set(backend.padding.values()) == {"zero"}
    for name in (f"{site}.weight" for site in sites):
        assert error[name] < 0.8 * unaware[name], name
        assert moments.z(name, exact[name]).square().mean().sqrt() < 1.5, name


def test_sites_with_gradients_in_padding_are_refused():
    model, batch = Masked(), masked_batch()
    model.leak = True
    exact = gradients(model, *batch)
    backend = Backend(padding="attention_mask", padding_exclude="*.0.q", **EARLY)
    compiled = torch.compile(model, backend=backend)
    gradients(model, *batch, call=compiled)
    with pytest.warns(WtacrsWarning, match=r"refused from now on: .*blocks.1.down:256x64.* padding_exclude"):
        gradients(model, *batch, call=compiled)
    assert not any("blocks.0.q" in site for site in backend.padding)
    assert {s for s, v in backend.padding.items() if v == "zero"} <= {s for s in backend.padding if s[9] in "kv"}
    moments = Moments()
    for _ in range(100):
        moments.add(gradients(model, *batch, call=compiled))
    for n in ("blocks.0.down.weight", "blocks.1.up.weight"):
        assert moments.z(n, exact[n]).square().mean().sqrt() < 1.4, n


def test_a_batch_without_padding_shows_nothing():
    model, (x, target, mask) = Masked(layers=1), masked_batch()
    backend = Backend(padding="attention_mask", norms="position", **EARLY)
    compiled = torch.compile(model, backend=backend)
    gradients(model, x, target, torch.ones_like(mask), call=compiled)
    assert set(backend.padding.values()) == {"unknown"}
    gradients(model, x, target, mask, call=compiled)
    assert set(backend.padding.values()) == {"zero"}
    means = backend.norms.mean["blocks.0.down:256x64"]
    assert (means > 0).all(), "positions that are often padding have the mean of those that are not"


def test_no_gradient_at_all_shows_nothing():
    """Rows of padding have no gradient in the first step, nor has any other row: as of a LoRA's first factor."""
    model, batch = Masked(layers=1), masked_batch()
    model.leak = True
    backend = Backend(padding="attention_mask", **EARLY)
    compiled = torch.compile(model, backend=backend)
    gradients(model, *batch, call=lambda *batch: 0 * compiled(*batch))
    assert set(backend.padding.values()) == {"unknown"}
    gradients(model, *batch, call=compiled)
    assert next(v for s, v in backend.padding.items() if s.startswith("blocks.0.down")) == "refused"


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="T5 is several graphs before, and the decoder's has no such argument"
)
def test_a_mask_of_other_rows_of_the_same_number():
    """T5 with as many target tokens as input tokens: the mask is the encoder's, and the decoder's rows have gradients."""
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=50)
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(config).train()
    ids, mask = torch.randint(2, 50, (8, 16)), masked_batch()[2]
    backend = Backend(padding="attention_mask", **EARLY)
    torch.compile(model, backend=backend)(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    for site, verdict in backend.padding.items():
        of_encoder = site.startswith("encoder") or "EncDecAttention.k" in site or "EncDecAttention.v" in site
        assert verdict == ("zero" if of_encoder else "refused"), site
    assert len(set(backend.padding.values())) == 2


def test_check_reports_refused_sites():
    model, batch = Masked(layers=1), masked_batch()
    options = {**EARLY, "padding": "attention_mask"}
    assert wtacrs_fx.check(model, batch, draws=6, **options).faults == []
    torch._dynamo.reset()
    model.leak = True
    with pytest.warns(WtacrsWarning):
        found = wtacrs_fx.check(model, batch, draws=6, **options)
    assert any("padding='attention_mask' is refused" in f and "blocks.0.down" in f for f in found.faults), found.faults
    assert "padding='attention_mask' is refused" in found.table()


class Broken(nn.Module):
    """The mask is an input of one graph only, of the first or of the second."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.a, self.b, self.late = nn.Linear(64, 64), nn.Linear(64, 64), late

    def forward(self, x, attention_mask):
        if self.late:
            x = self.b(x).relu()
            torch._dynamo.graph_break()
        x = self.a(x * attention_mask[..., None]) * attention_mask[..., None]
        if not self.late:
            torch._dynamo.graph_break()
            x = self.b(x.relu())
        return x.square().mean()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("named", [False, True], ids=["object", "name"])
def test_around_a_graph_break_rows_are_sampled_like_others(late, named):
    x, _, mask = masked_batch()
    options = {**EARLY, "padding": "attention_mask", "norms": PositionNorms()}
    model = Broken(late)
    compiled = (
        torch.compile(model, backend="wtacrs", options=options)
        if named
        else torch.compile(model, backend=Backend(**options))
    )
    before = len(ledgers())
    with pytest.warns(WtacrsWarning, match=r"this part of the model has no such input.* Its inputs are (x|unnamed)"):
        compiled(x, mask).backward()
    state = RowState.of(options["norms"])
    assert [(s.partition(":")[0], t.verdict) for s, t in state.padding.items()] == [("a", "zero")]
    assert len(ledgers()) - before == 2


def test_a_wrong_name_in_a_model_with_a_break_is_warned_of_in_every_part():
    x, _, mask = masked_batch()
    compiled = torch.compile(Broken(late=False), backend="wtacrs", options={**EARLY, "padding": "mask"})
    with pytest.warns(WtacrsWarning, match="this part of the model has no such input") as caught:
        compiled(x, mask).backward()
    inputs = [str(w.message).partition("Its inputs are ")[2].partition(".")[0] for w in caught]
    assert [sorted(i.split(", ")) for i in inputs if i] == [["attention_mask", "x"], ["x"]]


def test_no_warning_where_nothing_is_sampled():
    """A part without a layer, and the whole without gradients."""
    x, _, mask = masked_batch()
    model = Broken(late=False)
    model.b = nn.Identity()
    compiled = torch.compile(model, backend="wtacrs", options={**EARLY, "padding": "attention_mask"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", WtacrsWarning)
        with torch.no_grad():
            compiled(x, mask)
        compiled(x, mask).backward()


def test_parts_without_a_break_of_their_own():
    """A module called between graphs is a whole graph: what tells it from a wrong name is that another graph of the model had
    the argument. torch.compile hands both the same options."""
    x, target, mask = masked_batch()
    options, wrong = ({**EARLY, "padding": "attention_mask"} for _ in range(2))
    model = Masked(layers=1)
    torch.compile(model, backend="wtacrs", options=options)(x, target, mask)
    part = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with pytest.warns(WtacrsWarning, match="this part of the model has no such input"):
        torch.compile(part, backend="wtacrs", options=options)(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="padding='attention_mask': no such argument"):
        torch.compile(part, backend="wtacrs", options=wrong)(x)


def test_unknown_name_lists_the_arguments():
    model, batch = Masked(layers=1), masked_batch()
    compiled = torch.compile(model, backend=Backend(padding="mask", **EARLY))
    with pytest.raises(Exception, match=r"padding='mask': no such argument.* are x, attention_mask, target"):
        compiled(*batch)
    with pytest.raises(TypeError, match="padding=True"):
        Backend(padding=True)


def test_a_mask_of_another_shape_is_warned_of():
    model, (x, target, _) = Transformer(layers=1), masked_batch()
    with pytest.warns(WtacrsWarning, match=r"padding='x' has the shape \(8, 16, 64\), and no linear layer"):
        gradients(model, x, target, call=torch.compile(model, backend=Backend(padding="x", **EARLY)))


def test_pooled_rows_are_not_masked():
    """A mask of [B, T] says nothing about a layer of B rows."""
    model, batch = Masked(layers=1), masked_batch(batch=40)
    backend = Backend(padding="attention_mask", exclude=(), **{k: v for k, v in EARLY.items() if k != "exclude"})
    gradients(model, *batch, call=torch.compile(model, backend=backend))
    assert any(e.module == "classifier" and e.decision == "early" for e in backend.ledger.entries)
    assert backend.padding
    assert not any("classifier" in site for site in backend.padding)


@pytest.mark.parametrize("estimator", ["crs", "wta_crs", "systematic"])
def test_fewer_rows_than_are_kept(estimator):
    """All mass on 5 of 64 rows, 20 kept: the 5 stand for the whole sum, scales are finite, no other row counts."""
    w = torch.zeros(64)
    w[10:15] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    total = torch.zeros(64, dtype=torch.float64)
    for seed in range(300):
        rows, scale = ESTIMATORS[estimator](w, 20, lambda s, n, seed=seed: uniform(torch.tensor([seed]), s, n))
        assert torch.isfinite(scale).all()
        total.index_add_(0, rows, scale.double())
    assert total[w == 0].sum() == 0
    torch.testing.assert_close(total[w > 0] / 300, torch.ones(5, dtype=torch.float64), rtol=0, atol=0.15)


class Indexed(Masked):
    """Reads its mask as Hugging Face's models do, so that the mask's batch size is a symbol of its own."""

    def forward(self, x, target, attention_mask):
        rows, columns = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])
        return super().forward(x, target, attention_mask[rows, columns])


def test_a_mask_whose_batch_size_is_another_symbol():
    model, backend = Indexed(layers=1), Backend(**{**EARLY, "padding": "attention_mask"})
    compiled = torch.compile(model, backend=backend)
    for batch, length in ((8, 16), (5, 12)):
        tensors = masked_batch(batch=batch, length=length)
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
        for tensor in tensors[::2]:
            torch._dynamo.mark_dynamic(tensor, 1)
        gradients(model, *tensors, call=compiled)
    assert len(backend.ledgers) == 1
    assert isinstance(backend.ledger.entries[-1].rows, str), "sizes are symbols"
    assert len(backend.padding) == 6
    assert set(backend.padding.values()) == {"zero"}
