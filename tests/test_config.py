"""Options are checked before anything is traced, and the errors say what to change."""

import dataclasses

import pytest

from wtacrs_fx import Backend, Config, partitioner


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ratio": 0}, ValueError, ["ratio=0", "0 < ratio <= 1"]),
        ({"ratio": 1.5}, ValueError, ["ratio=1.5"]),
        ({"ratio": -0.1}, ValueError, ["ratio=-0.1"]),
        ({"ratio": float("nan")}, ValueError, ["ratio=nan"]),
        ({"ratio": "0.3"}, TypeError, ["ratio='0.3'", "a number"]),
        ({"ratio": True}, TypeError, ["ratio=True"]),
        ({"ratios": 0.3}, TypeError, ["'ratios'", "Did you mean 'ratio'?", "Known options"]),
        ({"max_autotune": True}, TypeError, ["'max_autotune'", "'inductor'"]),
        ({"estimator": "wtacrs"}, ValueError, ["estimator='wtacrs'", "Did you mean 'wta_crs'?", "'systematic'"]),
        ({"late": "maybe"}, ValueError, ["late='maybe'", "'sample'", "'exact'"]),
        ({"inner": "nvfuser"}, ValueError, ["inner='nvfuser'", "'eager'"]),
        ({"min_rows": 0}, ValueError, ["min_rows=0", ">= 1"]),
        ({"min_rows": 1.5}, TypeError, ["min_rows=1.5"]),
        ({"min_bytes": -1}, ValueError, ["min_bytes=-1"]),
        ({"row_bits": 2}, ValueError, ["row_bits=2", "None or one of 8, 4"]),
        ({"row_bits": 8.0}, TypeError, ["row_bits=8.0"]),
        ({"row_bits": True}, TypeError, ["row_bits=True"]),
        ({"seed": 2**64}, ValueError, ["seed=", "64 bits"]),
        ({"seed": "a"}, TypeError, ["seed='a'"]),
        ({"include": 3}, TypeError, ["include=3", "pattern"]),
        ({"exclude": ["*.q", 1]}, TypeError, ["exclude=", "pattern"]),
        ({"verbose": "yes"}, TypeError, ["verbose='yes'"]),
        ({"verbose": 3}, TypeError, ["verbose=3", "or 2"]),
        ({"attention": 1}, TypeError, ["attention=1"]),
        ({"center_rows": 1}, TypeError, ["center_rows=1"]),
        ({"directions": -1}, ValueError, ["directions=-1", ">= 0"]),
        ({"directions": True}, TypeError, ["directions=True"]),
        ({"inductor": 3}, TypeError, ["inductor=3", "dict"]),
        ({"inductor": {"custom_partitioner_fn": None}}, ValueError, ["custom_partitioner_fn"]),
    ],
)
@pytest.mark.parametrize("entry", [Config.from_options, lambda o: partitioner(**o), lambda o: Backend(**o)])
def test_bad_options(options, error, words, entry):
    with pytest.raises(error) as info:
        entry(options)
    for word in words:
        assert word in str(info.value)


def test_options_must_be_a_mapping():
    with pytest.raises(TypeError, match="expected a dict"):
        Config.from_options([("ratio", 0.3)])


def test_config_and_options_exclude_each_other():
    with pytest.raises(TypeError, match="not both"):
        Backend(Config(), ratio=0.1)


def test_a_single_pattern_is_a_pattern():
    assert Config(include="*.query").include == ("*.query",)
    assert Config(exclude=["a", "b"]).exclude == ("a", "b")


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().ratio = 0.1


def test_fingerprint_covers_every_option():
    changed = {
        "ratio": 0.2,
        "noise": 0.1,
        "recalibrate": 5,
        "recompilations": 5,
        "estimator": "crs",
        "row_bits": 8,
        "center_rows": True,
        "directions": 8,
        "min_rows": 5,
        "min_bytes": 5,
        "include": "a",
        "exclude": (),
        "norms": "position",
        "padding": "attention_mask",
        "padding_exclude": "a",
        "late": "exact",
        "attention": True,
        "memory_budget": 0.5,
        "round_bits": 8,
        "round_include": "a",
        "round_exclude": (),
        "round_fused_attention": True,
        "round_float64": True,
        "pack_masks": False,
        "seed": 3,
        "inner": "eager",
        "inductor": {"max_autotune": True},
        "verbose": True,
    }
    assert set(changed) == {f.name for f in dataclasses.fields(Config)}, "a new option needs a value here"
    prints = {Config(**{k: v}).fingerprint() for k, v in changed.items()} | {Config().fingerprint()}
    assert len(prints) == len(changed) + 1
    assert Config().fingerprint() == Config().fingerprint()


def test_every_option_is_documented():
    for field in dataclasses.fields(Config):
        assert len(field.metadata["doc"]) > 20, field.name
        assert f"`{field.name}`" in Config.table()
