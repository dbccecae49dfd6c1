import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import metakern
from metakern.cli import main
from metakern.trainers import train
from metakern.trainers.report import write_report
from metakern.trainers.report.figures import error_by_cost, error_by_majority, weight_distribution
from metakern.trainers.report.gallery import shades
from metakern.trainers.step_time import step_time


@pytest.fixture
def stand_in(monkeypatch):
    """l2rw_step replaced by one that keeps every second example: these tests are about what is shown."""

    def step(model, batch, meta_batch, *, optimizer, engine):
        n = len(batch[1])
        weights = (torch.arange(n) % 2).float() / (n // 2)
        losses = torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        optimizer.zero_grad()
        (weights * losses).sum().backward()
        optimizer.step()
        return SimpleNamespace(weights=weights, losses=losses.detach(), meta_loss=losses.mean().detach())

    monkeypatch.setattr(metakern, "l2rw_step", step, raising=False)


class Balanced(HTMLParser):
    """Fails on a tag that is closed without being open, and remembers what it saw."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href") and value]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_whole_and_self_contained(quick, tmp_path, stand_in):
    folders = [
        train(replace(quick, method=name), tmp_path / name, progress=False).folder for name in ("uniform", "l2rw")
    ]
    text = write_report(folders, tmp_path / "report.html", step_times={"uniform": "1", "l2rw": "1.23"}).read_text()
    page = Balanced(text)
    assert not page.open
    assert page.seen.count("svg") == 2
    assert page.seen.count("img") > 12
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "most trusted" in text
    assert "1.23" in text
    assert "prefers-color-scheme: dark" in text
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', text)) <= set(identifiers)
    assert not {tag for tag in page.seen if ":" in tag}  # no elements that HTML does not know


def test_runs_of_one_method_are_told_apart(quick, tmp_path, stand_in):
    configs = [replace(quick, method="l2rw", lr=lr) for lr in (1e-3, 1e-2)]
    folders = [train(config, tmp_path / f"{config.lr:g}", progress=False).folder for config in configs]
    text = write_report(folders, tmp_path / "report.html").read_text()
    for folder in folders:
        assert f"What l2rw, {folder} learned about the training examples" in text
        assert f"<td>l2rw, {folder}</td>" in text
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    other = train(replace(quick, data="digits", majority=None), tmp_path / "digits", progress=False).folder
    with pytest.raises(ValueError, match=r"have different data \(digits-4v9; digits\): one"):
        write_report([folders[0], other], tmp_path / "report.html")


def test_class_names_that_matplotlib_has_no_signs_for(recwarn):
    svg = weight_distribution(torch.rand(50).numpy(), (torch.arange(50) % 2).numpy(), ("好", "差"), "l2rw")
    assert "好" in svg
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_images_are_stretched_to_what_can_be_seen():
    values = np.array([[[-2.0, 0.0], [1.0, 2.0]]])
    assert shades(values).tolist() == [[0.0, 0.5], [0.75, 1.0]]
    assert shades(values.clip(0, 1)).tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert shades(np.zeros((3, 4, 5))).shape == (4, 5, 3)


def test_noise_is_shown_by_what_became_of_the_labels(quick, tmp_path, stand_in):
    noisy = replace(quick, method="l2rw", data="digits", majority=None, noise="symmetric", noise_rate=0.4, steps=60)
    run = train(noisy, tmp_path, progress=False)
    text = write_report([run.folder], tmp_path / "report.html").read_text()
    assert "of the labels were flipped" in text
    assert "label flipped, least trusted" in text


def test_many_classes_are_shown_in_thirds(quick, tmp_path, stand_in):
    run = train(replace(quick, method="l2rw", data="digits", majority=None, imbalance=20.0), tmp_path, progress=False)
    text = write_report([run.folder], tmp_path / "report.html").read_text()
    assert "rarest third of the classes" in text


def test_colours_come_from_the_page(quick):
    svg = weight_distribution(torch.rand(50).numpy(), (torch.arange(50) % 2).numpy(), ("4", "9"), "l2rw")
    assert "var(--ink)" in svg
    assert "#010203" not in svg
    assert "<style" in svg
    assert not re.search(r'<svg [^>]*\b(width|height)="', svg)


def test_figures_take_odd_input():
    assert "<svg" in error_by_majority({"l2rw": {0.9: (1.0, float("nan"))}, "uniform": {0.9: (2, 1), 0.99: (3, 1)}})
    many = {f"method number {k}": {0.9: (1.0 + k, 0.1), 0.99: (2.0, 1.0)} for k in range(80)}
    assert "<svg" in error_by_majority(many)
    assert "method number 79" in error_by_cost({name: (100.0 + len(name), 3.0, 0.5) for name in many})
    zeros = torch.zeros(5).numpy()
    assert "<svg" in weight_distribution(zeros, zeros.astype(int), ("4", "9"), "all unused")


def test_runs_of_one_name_on_other_rows(tmp_path, capsys):
    runs = []
    for name, shift in (("one", 0), ("two", 1)):
        (tmp_path / "own.csv").write_text("x,y\n" + "".join(f"{(k + shift) % 7},{k % 2}\n" for k in range(40)))
        runs.append(str(tmp_path / name))
        given = ["--data", f"csv:{tmp_path / 'own.csv'}", "--label", "y", "--steps", "2", "--threads", "1"]
        assert main(["train", "uniform", *given, "--meta-per-class", "1", "--out", runs[-1]]) == 0
    assert main(["report", *runs]) == 2
    assert "one and" in (said := capsys.readouterr().err)
    assert "have different contents of files" in said


def test_missing_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"result\.json is missing"):
        write_report([tmp_path], tmp_path / "report.html")


def test_report_without_the_data(quick, tmp_path, stand_in, monkeypatch):
    from metakern.data import DataNotFound
    from metakern.trainers.report import runs

    run = train(replace(quick, method="l2rw"), tmp_path, progress=False)

    def absent(*_, **__):
        raise DataNotFound("not here")

    monkeypatch.setattr(runs, "load", absent)
    assert "the data set is not at hand" in write_report([run.folder], tmp_path / "report.html").read_text()


def test_report_of_images_that_have_changed(quick, tmp_path):
    """The ids of a run are places in the list of files: with another file they would show other images."""
    for k in range(12):
        for name, shade in (("dark", 10), ("light", 200)):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (28, 28), shade + k).save(tmp_path / "photos" / name / f"{k}.png")
    config = replace(quick, method="l2rw", data=f"images:{tmp_path / 'photos'}", majority=None, steps=2)
    run = train(config, tmp_path / "run", progress=False)
    page = write_report([run.folder], tmp_path / "report.html").read_text()
    assert "<img" in page
    assert "; 10 examples in the meta set" in page  # whose labels nobody has called certain
    assert (
        "No images are marked as meta: 10 were drawn, with the labels they have; mark trusted ones by a folder" in page
    )
    Image.new("L", (28, 28), 0).save(tmp_path / "photos" / "dark" / "00.png")
    again = write_report([run.folder], tmp_path / "report.html").read_text()
    assert "<img" not in again
    assert "the data set is not at hand, or is another now" in again


@pytest.mark.parametrize(("method", "marked"), [("l2rw", False), ("l2rw", True), ("uniform", False)])
def test_a_meta_set_that_nobody_vouches_for_is_said(tmp_path, capsys, method, marked):
    rows = [f"{k % 7},{k % 2},{'meta' if marked and k < 6 else 'train'}" for k in range(40)]
    (tmp_path / "own.csv").write_text("\n".join(["a,kind,split", *rows]))
    options = ["--data", f"csv:{tmp_path / 'own.csv'}", "--label", "kind", "--steps", "2", "--threads", "1"]
    for _ in range(2):  # run, and shown again
        assert main(["train", method, *options, "--out", str(tmp_path / "run")]) == 0
        said = "o rows are marked as meta: 10 were drawn, with the labels they have; mark trusted ones with split=meta"
        # The report shows a meta set whatever the method does with it.
        assert (f"n{said}" in capsys.readouterr().out) == (method == "l2rw" and not marked)
        assert (f"N{said}" in (tmp_path / "run" / "report.html").read_text()) != marked


@pytest.mark.parametrize("noise", [[], ["--noise", "uniform", "--noise-rate", "0.2"]])
def test_labels_of_ones_own_data_are_not_taken_for_true(tmp_path, noise):
    """Unless noise was added to them, nobody knows which of the proposed ones are right."""
    (tmp_path / "own.csv").write_text("\n".join(["a,kind", *(f"{k % 7},{k % 3}" for k in range(60))]))
    options = ["--data", f"csv:{tmp_path / 'own.csv'}", "--label", "kind", "--steps", "2", "--threads", "1", *noise]
    assert main(["train", "mlc", *options, "--out", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "proposed labels other than the given ones" in page
    assert ("given labels that are true" in page) == bool(noise)


def test_images_of_a_meta_set_that_is_trained_on(quick, tmp_path):
    for part in ("train", "test", "meta"):
        for k in range(6):
            for name, shade in (("dark", 10), ("light", 200)):
                (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
                Image.new("L", (28, 28), shade + k).save(tmp_path / part / name / f"{k}.png")
    config = replace(quick, method="clean-only", data=f"images:{tmp_path}", majority=None, steps=2)
    run = train(config, tmp_path / "run", progress=False)
    assert write_report([run.folder], tmp_path / "report.html").read_text().count("<img") == 12


def test_step_time_is_a_ratio(quick, tmp_path):
    run = train(quick, tmp_path, progress=False)
    measured = step_time(quick, run.task, pairs=4)
    assert 0 < measured.low <= measured.ratio <= measured.high
    assert measured.plain_seconds > 0
