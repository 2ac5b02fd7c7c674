"""Models by name, by config file and from Python; the command ``wtacrs-fx report``."""

import json
import sys

import pytest
import torch

from wtacrs_fx import presets
from wtacrs_fx.cli import main
from wtacrs_fx.errors import ReportError
from wtacrs_fx.presets import PRESETS, build

from small_presets import OVERRIDES, small

PARAMETERS = {
    "bert-base": 109e6,
    "bert-large": 335e6,
    "t5-base": 223e6,
    "t5-large": 738e6,
    "t5-3b": 2852e6,
    "opt-1.3b": 1316e6,
    "gpt2": 124e6,
    "gpt2-xl": 1558e6,
    "llama-3.2-1b": 1236e6,
    "llama-3-8b": 8030e6,
    "qwen2.5-7b": 7616e6,
    "vit-base": 86e6,
    "whisper-small": 242e6,
}
"""As published."""


@pytest.mark.parametrize("name", PRESETS)
def test_size_is_the_published_one(name):
    model, _ = build(name, batch_size=1, length=8)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[name], rel=0.01)
    assert model.training
    assert all(p.device.type == "meta" for p in model.parameters())


def test_lora_trains_the_adapters_only():
    model, _ = small("llama-3-8b", lora={"r": 4}, dtype=torch.bfloat16)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    assert {p.dtype for n, p in model.named_parameters() if n not in trained} == {torch.bfloat16}


def test_config_file(tmp_path):
    path = tmp_path / "config.json"
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], **OVERRIDES["bert"]}
    path.write_text(json.dumps(config))
    for name in (path, tmp_path):
        model, batch = build(str(name), batch_size=2, length=8)
        assert type(model).__name__ == "BertForSequenceClassification"
        assert batch["input_ids"].shape == (2, 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected a transformers config.json"),
        ("[1]", "expected a transformers config.json"),
        ("{}", "'model_type'"),
        ('{"model_type": "no-such-model"}', "cannot read it: Unrecognized model identifier: no-such-model.$"),
        ('{"model_type": "bert", "hidden_size": "large"}', "cannot read it: .*hidden_size.*got str"),
        ('{"model_type": "bert"}', "task=None: expected one of classification, causal-lm"),
    ],
)
def test_config_files_that_cannot_be_read(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=words):
        build(str(path), batch_size=2, length=8)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ReportError, match="presets and config files need transformers"):
        build("bert-base", batch_size=2, length=8)


@pytest.mark.parametrize(
    ("name", "limit"), [("bert-base", 512), ("gpt2", 1024), ("opt-1.3b", 2048), ("whisper-small", 448)]
)
def test_sequences_longer_than_the_learned_positions(name, limit):
    """(An index beyond the end of a table is no error on tensors without data.)"""
    with pytest.raises(ReportError, match=f"{limit + 1} tokens: {name} has learned positions for {limit}"):
        build(name, batch_size=1, length=limit + 1)
    build(name, batch_size=1, length=limit)


@pytest.mark.parametrize("name", ["t5-base", "vit-base", "llama-3-8b"])
def test_other_positions_have_no_limit(name):
    build(name, batch_size=1, length=10_000)


def test_bad_names():
    with pytest.raises(ReportError, match=r"neither a preset nor a config file\. Presets: bert-base, bert-large"):
        build("bert-bass", batch_size=2, length=8)
    with pytest.raises(ReportError, match="vit-base has no model for task 'seq2seq'"):
        build("vit-base", batch_size=2, length=8, task="seq2seq")
    with pytest.raises(ReportError, match="lora"):
        small("bert-base", lora={"rank": 4})


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "bert-small", presets.Preset("bert", "classification", OVERRIDES["bert"]))
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "csv")}
    command = ["report", "--model", "bert-small", "--ratio", "0.25", "--option", "min_bytes=0"]
    options = ["--option", "memory_budget=None"]
    assert main([*command, *options, *(x for kind, path in files.items() for x in (f"--{kind}", str(path)))]) == 0
    out = capsys.readouterr().out
    assert "bert.encoder.layer.0" in out
    assert "total at the peak" in out
    assert json.loads(files["json"].read_text())["saved_bytes"] > 0
    assert files["csv"].read_text().startswith("module,op,shape")
    for extra, words in (
        (["--gpu-memory", "80 Gigs"], "'80 Gigs'"),
        (["--gpu-memory", "1 MB"], "1 MB: parameters"),
        (["--option", "ration=3"], "Did you mean 'ratio'?"),
        (["--option", "late"], "expected NAME=VALUE"),
        (["--ratio", "2"], "0 < ratio <= 1"),
        (["--json", str(tmp_path / "none" / "report.json")], "there is no folder"),
        (["--plot", str(tmp_path / "report.xyz")], "'xyz' is not supported"),
        (["--device", "cdua"], "device='cdua': expected a device of torch"),
    ):
        assert main([*command, *options, *extra]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("json:dumps", "missing a required argument: 'obj'"),
        ("os:getcwd", "it returned str, expected a tuple"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("json", "expected MODULE:FUNCTION"),
    ],
)
def test_python_models_that_cannot_be_made(name, words, capsys):
    assert main(["report", "--python", name]) == 1
    assert words in capsys.readouterr().err


def test_python_models_without_a_batch_and_with_errors_of_their_own(tmp_path, capsys, monkeypatch):
    (tmp_path / "own_data.py").write_text(
        "import torch\n"
        "class Table(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.x, self.f = torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Linear(64, 64)\n"
        "    def forward(self):\n"
        "        return self.f(self.x).sin().sum()\n"
        "def make():\n"
        "    return Table(), ()\n"
        "def fail():\n"
        "    raise ValueError('no data')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--python", "own_data:make"]) == 0
    assert "Training with adamw:" in capsys.readouterr().out
    assert main(["report", "--python", "own_data:make", "--gpu-memory", "1 GB"]) == 1
    assert "no batch size to change" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^no data$"):
        main(["report", "--python", "own_data:fail"])


def test_a_model_that_branches_on_data_has_a_report_up_to_there_and_no_training_memory(tmp_path, capsys, monkeypatch):
    (tmp_path / "branch.py").write_text(
        "import torch\n"
        "class Branch(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        x = super().forward(x).tanh()\n"
        "        return x.exp().sum() if x.sum() > 0 else x.sum()\n"
        "def make():\n"
        "    return Branch(64, 64), torch.randn(512, 64)\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["report", "--python", "branch:make", "--option", "memory_budget=None"]
    for extra, code in (([], 0), (["--gpu-memory", "1 GB"], 1)):
        torch._dynamo.reset()
        assert main([*command, *extra]) == code
        out = capsys.readouterr().out
        assert "branch.py:5 (return x.exp().sum() if x.sum() > 0 else x.sum())" in out
        assert out.splitlines()[-1].startswith("Training memory is unknown")


def test_lora_options_with_lists_of_modules(capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "bert-small", presets.Preset("bert", "classification", OVERRIDES["bert"]))
    command = ["report", "--model", "bert-small", "--option", "min_bytes=0", "--option", "memory_budget=None"]
    assert main([*command, "--lora", "r=4, target_modules=['query', 'dense'],lora_alpha=8", "--level", "site"]) == 0
    sites = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "aten.mm" in line]
    assert {s.split(".lora_")[0].rpartition(".")[2] for s in sites} == {"query", "dense"}


@pytest.mark.parametrize("command", ["report", "check"])
def test_options_of_presets_are_refused_for_models_made_elsewhere(command, capsys):
    options = ["--batch-size", "8", "--seq-len", "7", "--dtype", "float32", "--lora", "r=4", "--task", "image"]
    assert main([command, "--python", "json:dumps", *options]) == 1
    text = capsys.readouterr().err
    for option in ("--batch-size 8", "--seq-len 7", "--dtype float32", "--lora r=4", "--task image"):
        assert option in text
    assert "that function makes the model and the batch" in text


def test_command_finds_the_largest_batch_of_a_python_model(tmp_path, capsys, monkeypatch):
    (tmp_path / "my_net.py").write_text(
        "import torch\n"
        "def make():\n"
        "    sizes = (256, 512), (512, 256), (256, 512), (512, 1)\n"
        "    layers = [layer for size in sizes for layer in (torch.nn.Linear(*size), torch.nn.GELU())]\n"
        "    return torch.nn.Sequential(*layers[:-1]), torch.randn(64, 256)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--python", "my_net:make", "--gpu-memory", "16 MB", "--optimizer", "sgd"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[:5] == ["largest", "batch", "in", "16", "MB"]
    assert int(last[-1]) > int(last[-2]) > 64
