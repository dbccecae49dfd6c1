"""What the documents show as code runs, and does what they say."""

import contextlib
import copy
import csv
import io
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.methods.logit_adjustment import logit_adjusted_loss
from metakern.testing import inputs

ROOT = Path(__file__).parents[1]


def shown(page: str, heading: str = "") -> str:
    """The first block of code of a page, or of one of its sections."""
    text = (ROOT / page).read_text()
    start = text.index(f"\n## {heading}\n") if heading else 0
    found = re.search(r"```python\n(.*?)```", text[start:], re.DOTALL)
    assert found is not None
    return found[1]


def names_in(page: str, heading: str) -> dict[str, Any]:
    """What a block of code defines."""
    names: dict[str, Any] = {}
    exec(compile(shown(page, heading), page, "exec"), names)
    return names


@pytest.fixture
def printed() -> Any:
    """Runs a block as a prompt would, with one thread, and returns what it printed."""

    def run(page: str, heading: str = "") -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(shown(page, heading), page, "exec"), {"__name__": "__main__"})
        return output.getvalue()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


def test_first_page(printed: Any) -> None:
    engine, share = printed("README.md").split(" ", 1)
    assert engine == "ghost"
    assert float(share.strip().removeprefix("tensor(").removesuffix(")")) > 0.7


def test_costs_on_the_first_page() -> None:
    """The range in its first lines is that of its table, without BatchNorm."""
    page = (ROOT / "README.md").read_text()
    cells = [line.split("|") for line in re.search(r"\| case .*?\n\n", page, re.DOTALL)[0].splitlines()[2:] if line]
    costs = [float(row[2].strip(" *")) for row in cells if "BatchNorm" not in row[1]]
    assert len(costs) > 5
    assert f"{min(costs):.1f} to {max(costs):.1f} plain steps" in page


def test_guide(printed: Any) -> None:
    before, after, suspects, wrong = map(float, re.findall(r"([\d.]+)(?:%| least)", printed("docs/guide.md")))
    assert suspects == 200
    assert after < before / 2
    assert wrong > 90


def ahead(method: str, beside: str) -> tuple[int, int]:
    """On how many leaderboards with both methods the first is ahead of plain training; by more than its interval."""
    found = significant = 0
    for path in (ROOT / "experiments" / "leaderboards").glob("*.csv"):
        with path.open(newline="") as file:
            rows = {row["method"]: row for row in csv.DictReader(file)}
        if method in rows and beside in rows:
            mine, plain = rows[method], rows["uniform"]
            if path.stem.startswith("credit"):
                found += float(mine["area"]) > float(plain["area"])
            else:
                found += float(mine["mean"]) < float(plain["mean"])
                significant += float(mine["difference"]) + float(mine["interval"]) < 0
    return found, significant


def test_counts_of_the_guide() -> None:
    page = " ".join((ROOT / "docs" / "guide.md").read_text().split())
    words = "none one two three four five six seven".split()
    assert f"ahead of plain training on {words[ahead('l2rw', 'l2rw')[0]]} of the eleven" in page
    counts = [words[k] for method in ("logit-adjustment", "resample", "l2rw") for k in ahead(method, "resample")]
    first, its, second, all_of_its, third, of_them = counts
    assert f"plain training on {first} (on {its} of them by more" in page
    assert f"`resample` on {second} (all {all_of_its}), `l2rw` on {third} ({of_them})" in page
    few = [words[ahead(method, "glc")[0]] for method in ("uniform-ft", "glc", "l2rw")]
    assert "`uniform-ft` is ahead of plain training on {}, `glc` on {}, `l2rw` on {}".format(*few) in page


def test_complete_loop(printed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in its third epoch and started again, it ends where it does without."""
    step, steps = metakern.l2rw_step, 0

    def interrupted(*given: Any, **settings: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 50:
            raise KeyboardInterrupt
        return step(*given, **settings)

    results = []
    for folder in (tmp_path / "whole", tmp_path / "resumed"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        if folder.name == "resumed":
            monkeypatch.setattr(metakern, "l2rw_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                printed("docs/guide.md", "A complete loop")
            assert torch.load("checkpoint.pt")["epoch"] == 2
        results.append(printed("docs/guide.md", "A complete loop"))
    assert results[0] == results[1]
    assert float(results[0].split()[-1].rstrip("%")) < 10


def labels(n: int) -> Tensor:
    """Of pixels; one image has none at all."""
    drawn = torch.randint(0, 5, (n, 6, 6))
    drawn[:, 0], drawn[0] = 255, 255
    return drawn


TARGETS = {
    "regression": (lambda n: (torch.randn(n, 2),), 2),
    "multi_label": (lambda n: (torch.randint(0, 2, (n, 4)).float(),), 4),
    "segmentation": (lambda n: (labels(n),), 0),
    "detection": (lambda n: (torch.randn(2 * n, 4), torch.randint(0, n, (2 * n,))), 4),
}
"""By loss: what a batch of n images holds beside them, and the outputs of the network, 0 for one that convolves."""


@pytest.mark.parametrize("name", TARGETS)
def test_losses_of_your_own(name: str) -> None:
    torch.manual_seed(0)
    targets, outputs = TARGETS[name]
    if outputs:
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.Tanh(), nn.Linear(8, outputs))
    else:
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    batch, meta_batch = ((torch.randn(n, 3, 6, 6), *targets(n)) for n in (6, 3))
    report = metakern.check(model, batch, meta_batch, loss_fn=names_in("docs/guide.md", "Losses of your own")[name])
    assert report.ok, str(report)
    assert report.engine == "ghost"


def test_logit_adjustment_in_one_line() -> None:
    line = re.search(r"`(F\.cross_entropy\([^`]*\))`", (ROOT / "docs/guide.md").read_text())
    assert line is not None
    torch.manual_seed(0)
    logits, targets, counts = torch.randn(8, 3), torch.randint(0, 3, (8,)), torch.tensor([50, 7, 1])
    found = eval(line[1], {"F": F, "logits": logits, "targets": targets, "counts": counts})
    assert torch.equal(found, logit_adjusted_loss(logits, targets, counts).mean())


def test_weight_nets_label_nets_and_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # the program as it was traced: inductor needs a C++ compiler, and half a minute
    monkeypatch.setattr(metakern, "compile_step", partial(metakern.compile_step, backend="eager"))
    torch.manual_seed(0)
    page = names_in("docs/guide.md", "Weight nets, label nets, compiled steps")
    assert page["result"].weights.shape == (100,)
    for network in ("weight_net", "label_net", "model"):
        assert all(p.grad is not None for p in page[network].parameters())


def test_recipe_for_the_trainer(tmp_path: Path) -> None:
    """Its steps are those of `l2rw_step`, with the mean gradient of two micro-batches."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    trainer_class = names_in("docs/set-ups.md", "Hugging Face Trainer")["ReweightingTrainer"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=2, **sizes, **dropout)
    model = transformers.BertForSequenceClassification(config)
    words = torch.randint(0, 50, (12, 8))
    rows = [{"input_ids": row, "labels": (row[0] > 25).long()} for row in words]
    collate = transformers.default_data_collator
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    meta_batch = collate(rows[8:])
    for part in (rows[:4], rows[4:8]):
        rule = lambda dots: metakern.weights.clip_normalise(dots) / 2  # noqa: E731
        metakern.reweight_step(twin, collate(part), meta_batch, rule=rule, accumulate=True)
    optimizer.step()
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    meta_loader = torch.utils.data.DataLoader(rows[8:], batch_size=4, collate_fn=collate)
    trainer_class(model, arguments, train_dataset=rows[:8], meta_loader=meta_loader).train()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_accelerate_prepares_what_a_step_takes() -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    twin, data = copy.deepcopy(model), [inputs.pair(6, 3, 4, classes=3, dtype=torch.float32)]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(
        model, optimizers[0], torch.utils.data.DataLoader(data, batch_size=None)
    )
    for batch, meta_batch in loader:
        metakern.l2rw_step(model, tuple(batch), tuple(meta_batch), optimizer=optimizer)
    metakern.l2rw_step(twin, *data[0], optimizer=optimizers[1])
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_two_processes(tmp_path: Path) -> None:
    """Each rank's lines go to a file of its own: in one they may be torn."""
    (tmp_path / "train.py").write_text(shown("docs/set-ups.md", "Several processes"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--redirects", "1", "--log-dir", "logs", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=environment)
    printed = "".join(path.read_text() for path in tmp_path.glob("logs/**/stdout.log"))
    found = dict(re.findall(r"rank (\d): (\S+)", printed))
    assert set(found) == {"0", "1"}
    assert found["0"] == found["1"]


class ManualModule(nn.Module):
    """What the recipe uses of a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, Any] = {}

    def optimizers(self) -> Any:
        return self.configure_optimizers()

    def log(self, name: str, value: Any) -> None:
        self.logged[name] = value


def test_recipe_for_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", SimpleNamespace(LightningModule=ManualModule))
    page: dict[str, Any] = {}
    exec(compile(shown("docs/set-ups.md"), "docs/set-ups.md", "exec"), page)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batch, meta_batch = inputs.pair(6, 3, 4, classes=3, dtype=torch.float32)
    twin = copy.deepcopy(net)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    want = metakern.l2rw_step(twin, batch, meta_batch, optimizer=optimizer)
    module = page["Reweighted"](net)
    module.training_step({"train": list(batch), "meta": list(meta_batch)}, 0)
    assert module.automatic_optimization is False
    assert torch.equal(module.logged["meta_loss"], want.meta_loss)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
