import csv
import json
from dataclasses import replace

import pytest
import torch

import metakern
from metakern.cli import main
from metakern.data import Examples, Source
from metakern.data.episodes import split_classes
from metakern.methods.support_balance import BALANCES
from metakern.trainers import episodes_command
from metakern.trainers.episode_config import LEARNERS, EpisodeConfig
from metakern.trainers.episodes_command import run_episodes
from metakern.trainers.few_shot import Learner, Scores, episodes, fit, half_interval, judge


def made_up(separate: float = 4.0) -> Source:
    """Twenty classes of points, each around a centre of its own."""
    source = torch.Generator().manual_seed(0)
    targets = torch.arange(20).repeat_interleave(30)
    inputs = separate * torch.randn(20, 6, generator=source)[targets] + torch.randn(600, 6, generator=source)
    nothing = Examples(torch.empty(0, 6), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    return Source("made-up", Examples(inputs, targets, torch.arange(600)), nothing, tuple(map(str, range(20))))


@pytest.fixture
def config(monkeypatch) -> EpisodeConfig:
    monkeypatch.setattr(episodes_command, "load", lambda *_, **__: made_up())
    return EpisodeConfig(
        way=3,
        queries=5,
        train_episodes=8,
        validations=2,
        validation_episodes=4,
        test_episodes=6,
        inner_steps=2,
        threads=1,
    )


def test_intervals_by_hand():
    # Deviation 2 of four values: 1.96 * 2 / 2.
    values = torch.tensor([1.0, 3.0, 3.0, 5.0]).double() * (2 / (8 / 3) ** 0.5)
    assert half_interval(values) == pytest.approx(1.96)
    assert Scores(values, {}).interval == half_interval(values)


def test_protonet_learns_what_can_be_learnt(config):
    config = replace(config, train_episodes=60)
    split = split_classes(made_up(), smallest=14)
    learner = Learner("protonet", "none", config, split.train)
    fit(learner, split, config, progress=False)
    assert float(judge(learner, episodes(split.test, "linear", 20, config, 9)).accuracy.mean()) > 90


@pytest.mark.parametrize("name", ["maml", "maml-first-order"])
def test_maml_learns_what_can_be_learnt(name, config):
    config = replace(config, train_episodes=160, lr=1e-2, inner_steps=3)
    split = split_classes(made_up(), smallest=14)
    learner = Learner(name, "none", config, split.train)
    fit(learner, split, config, progress=False)
    assert float(judge(learner, episodes(split.test, "balanced", 20, config, 9)).accuracy.mean()) > 60


def test_the_best_parameters_on_the_validation_classes_are_kept(config):
    """A learning rate that destroys what the first look found."""
    config = replace(config, train_episodes=40, validations=40, lr=3.0)
    split = split_classes(made_up(separate=1.0), smallest=14)
    learner = Learner("protonet", "none", config, split.train)
    fit(learner, split, config, progress=False)
    kept = float(judge(learner, episodes(split.validation, "random", 4, config, config.seed + 2)).accuracy.mean())
    others = []
    for steps in (1, 2, 40):
        other = Learner("protonet", "none", config, split.train)
        fit(other, split, replace(config, train_episodes=steps, validations=1), progress=False)
        held = episodes(split.validation, "random", 4, config, config.seed + 2)
        others.append(float(judge(other, held).accuracy.mean()))
    assert kept >= others[0]
    assert kept >= others[2]


@pytest.mark.gpu
@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("balance", BALANCES)
def test_on_a_gpu(name, balance, config):
    config = replace(config, device="cuda", train_episodes=4, validation_episodes=2)
    split = split_classes(made_up(), smallest=14, seed=0)
    learner = Learner(name, balance, config, split.train)
    fit(learner, split, config, progress=False)
    found = judge(learner, episodes(split.test, "linear", 3, config, seed=7))
    assert next(learner.model.parameters()).is_cuda
    assert len(found.accuracy) == 3


def test_by_shots_is_the_accuracy_of_the_classes_with_so_many(config):
    split = split_classes(made_up(), smallest=14)
    learner = Learner("protonet", "none", config, split.train)
    scores = judge(learner, episodes(split.test, "linear", 5, config, 0))
    assert list(scores.by_shots) == [1, 5, 9]
    assert sum(scores.by_shots.values()) / 3 == pytest.approx(float(scores.accuracy.mean()))


def test_the_command_leaves_a_table_and_a_record(config, tmp_path):
    shown = run_episodes(config, tmp_path, progress=False)
    with (tmp_path / "episodes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["learner"], row["balance"]) for row in rows} == {(a, b) for a in LEARNERS for b in BALANCES}
    assert len(rows) == len(LEARNERS) * len(BALANCES) * 5
    assert all(float(row["difference"]) == 0 for row in rows if row["balance"] == "none")
    record = json.loads((tmp_path / "episodes.json").read_text())
    assert record["config"]["way"] == 3
    assert record["metakern"] == metakern.__version__
    assert not set(record["classes"]["train"]) & set(record["classes"]["test"])
    for row in rows[:5]:
        assert f"{float(row['accuracy']):.1f} ± {float(row['interval']):.1f}" in shown


def test_the_same_seed_gives_the_same_figures(config, tmp_path):
    config = replace(config, shapes="step", learners="protonet,maml", balances="none,over-sampling")
    first = run_episodes(config, tmp_path / "a", progress=False).splitlines()[:6]
    assert run_episodes(config, tmp_path / "b", progress=False).splitlines()[:6] == first
    assert run_episodes(replace(config, seed=1), tmp_path / "c", progress=False).splitlines()[:6] != first


def test_a_shape_has_the_same_episodes_whatever_else_is_asked_for(config, tmp_path):
    config = replace(config, learners="protonet", balances="none")
    run_episodes(replace(config, shapes="balanced,step"), tmp_path / "a", progress=False)
    run_episodes(replace(config, shapes="step"), tmp_path / "b", progress=False)
    step = [json.loads((tmp_path / run / "episodes.json").read_text())["rows"][-1] for run in ("a", "b")]
    assert step[0]["accuracy"] == step[1]["accuracy"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"learners": "protonet,nobody"}, "--learners"),
        ({"balances": ""}, "--balances"),
        ({"shapes": "round"}, "--shapes"),
        ({"train_shape": "round"}, "shape"),
        ({"test_episodes": 1}, "--test-episodes"),
        ({"inner_steps": -1}, "--inner-steps"),
        ({"lr": 0.0}, "--lr"),
        ({"queries": 0}, "--queries"),
        ({"most": 0}, "most"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        EpisodeConfig(**settings)


def test_too_few_classes_say_what_to_change(tmp_path, capsys):
    assert main(["episodes", "--data", "digits", "--out", str(tmp_path / "x")]) == 2
    shown = capsys.readouterr().err
    assert "--way 5" in shown
    assert "--held-out" in shown
    assert not (tmp_path / "x").exists()


def test_from_the_command_line(tmp_path, capsys):
    options = (
        "--way 2 --most 3 --queries 3 --train-episodes 4 --validations 1 --validation-episodes 2 --test-episodes 3"
    )
    options += " --inner-steps 1 --learners protonet,maml-first-order --balances none,focal --shapes linear --threads 1"
    assert main(["episodes", "--data", "digits", *options.split(), "--out", str(tmp_path)]) == 0
    assert "maml-first-order" in capsys.readouterr().out
    assert (tmp_path / "episodes.json").is_file()


def test_columns_of_a_table_are_left_out(tmp_path, capsys):
    (tmp_path / "own.csv").write_text("a,kind\n" + "".join(f"{k},{k % 7}\n" for k in range(40)))
    own = ["episodes", "--data", f"csv:{tmp_path / 'own.csv'}", "--label", "kind", "--out", str(tmp_path / "x")]
    assert main([*own, "--leave-out", "nme"]) == 2
    assert "--leave-out 'nme' is not a column" in capsys.readouterr().err


@pytest.mark.parametrize("learner", ["protonet", "maml-first-order"])
@pytest.mark.parametrize("episodes", [1, 8])
def test_a_learner_that_diverges_fails(learner, episodes, config, tmp_path):
    """In its last step as well."""
    with pytest.raises(ValueError, match=rf"{learner} with balance 'none': .*finite; a smaller --lr"):
        run_episodes(replace(config, learners=learner, train_episodes=episodes, lr=1e30), tmp_path, progress=False)


def test_learners_before_one_that_diverges_are_in_the_table(config, tmp_path):
    config = replace(config, learners="protonet,maml-first-order", balances="none", shapes="linear", inner_lr=1e30)
    with pytest.raises(ValueError, match=r"maml-first-order with balance 'none': .*finite"):
        run_episodes(config, tmp_path, progress=False)
    with (tmp_path / "episodes.csv").open(newline="", encoding="utf-8") as file:
        assert [row["learner"] for row in csv.DictReader(file)] == ["protonet"]
