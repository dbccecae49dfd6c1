import argparse

import pytest

from metakern.methods import find
from metakern.trainers.config import TrainConfig, add_options, from_options


def parse(*arguments: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    add_options(parser)
    return from_options(parser.parse_args(["l2rw", *arguments]))


def test_defaults_are_the_papers_codes():
    config = parse()
    assert config == TrainConfig("l2rw")
    assert (config.lr, config.momentum, config.train_size, config.meta_per_class) == (1e-3, 0.9, 5000, 5)
    assert config.total_steps(find("l2rw")) == 4000
    assert config.total_steps(find("uniform")) == 8000
    assert find("l2rw").batch_size == 100


def test_options_have_the_fields_types():
    config = parse("--majority", "0.9", "--batch-size", "7", "--schedule", "0.25", "--data", "mnist-4v9")
    assert (config.majority, config.batch_size, config.data) == (0.9, 7, "mnist-4v9")
    assert config.total_steps(find("l2rw")) == 1000
    assert parse("--steps", "12").total_steps(find("l2rw")) == 12


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("train_size", -1),
        ("evaluations", 0),
        ("lr", 0.0),
        ("schedule", -1),
        ("seed", -1),
        ("seed", 2**31),
        ("momentum", -0.1),
        ("weight_decay", -1.0),
        ("engine", "gost"),
        ("drops", "half"),
    ],
)
def test_refusals_name_the_option(name, value):
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        TrainConfig("l2rw", **{name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": "pink", "noise_rate": 0.1}, "--noise must be one of uniform, .*hierarchical, got 'pink'"),
        ({"noise": "flip"}, "--noise-rate 0: --noise flip takes a share above 0"),
        ({"noise": "flip", "noise_rate": 1.5}, "--noise-rate 1.5: --noise flip takes a share above 0"),
        ({"noise_rate": 0.4}, "--noise-rate 0.4: needs a kind, --noise"),
    ],
)
def test_noise_without_a_rate_or_a_rate_without_noise(given, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig("l2rw", **given)
