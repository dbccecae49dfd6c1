"""An encoder from a local folder: its own tokenizer and weights, MLRNet on top, and nothing from a network."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch

from metakern.cli import main
from metakern.methods.features import last_linear
from metakern.trainers import train
from metakern.trainers.metrics import read_metrics
from metakern.trainers.networks import network_for
from metakern.trainers.pretrained import Encoder, folder_of, tokenizer
from metakern.trainers.task import make_task

transformers = pytest.importorskip("transformers")

WORDS = "world goal market robot good bad rise fall".split()


@pytest.fixture
def folder(tmp_path):
    """A BERT of one small layer, saved as a pretrained one is."""
    place = tmp_path / "bert"
    place.mkdir()
    (place / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    transformers.BertTokenizer(str(place / "vocab.txt")).save_pretrained(place)
    torch.manual_seed(0)
    transformers.BertModel(small()).save_pretrained(place)
    return place


def small(**options):
    """The config of that BERT."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertConfig(**{"vocab_size": 13, **sizes, **options})


@pytest.fixture
def config(quick, folder, tmp_path):
    """A run on made-up news: of each class the texts hold one word that the others do not."""
    news = tmp_path / "ag_news"
    news.mkdir()
    rows = [[1 + k % 4, f"{WORDS[k % 4]} {WORDS[4 + k // 4 % 4]}", "good"] for k in range(80)]
    for name in ("train.csv", "test.csv"):
        with (news / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return replace(
        quick, data="ag-news", data_dir=str(tmp_path), majority=None, model=f"transformers:{folder}", meta_per_class=2
    )


def test_the_tokenizer_is_the_folders(config):
    tokens = make_task(config).train.inputs
    assert tokens.shape[1] == 64
    assert (tokens[:, 0] == 2).all()  # [CLS]
    assert ((tokens[:, 1] >= 5) & (tokens[:, 1] < 9)).all()  # the word of the class
    assert (tokens[:, 5:] == 0).all()


@pytest.mark.filterwarnings("ignore")
def test_mlrnet_on_an_encoder(config, tmp_path):
    run = train(
        replace(config, method="mlrnet", optimizer="adam", meta_batch_size=8),
        tmp_path / "run",
        progress=False,
    )
    assert run.config.name() == "ag-news-bert-mlrnet-0"
    assert last_linear(run.model).in_features == 16
    assert all(map(math.isfinite, read_metrics(run.folder / "metrics.csv")["meta_loss"]))


@pytest.mark.filterwarnings("ignore")
def test_weights_are_the_folders_and_padding_does_not_count(config, folder):
    task = make_task(config)
    model = network_for(task, 0, config.model).eval()
    own = transformers.BertModel.from_pretrained(folder)
    assert torch.equal(model.model.bert.embeddings.word_embeddings.weight, own.embeddings.word_embeddings.weight)
    tokens = task.train.inputs[:3]
    torch.testing.assert_close(model(tokens), model(tokens[:, :5]), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_head_for_other_classes_starts_anew(config, folder, tmp_path, capsys):
    """Two steps of mlrnet on the command line, from a folder whose classifier has three classes, not four."""
    transformers.BertForSequenceClassification(small(num_labels=3)).save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"classifier\.bias, classifier\.weight are initialised anew, for 4 classes"):
        model = Encoder(folder, 4)
    stored = transformers.BertForSequenceClassification.from_pretrained(folder)
    assert model.model.classifier.weight.shape == (4, 16)
    for name, value in stored.bert.state_dict().items():
        assert torch.equal(model.model.bert.state_dict()[name], value)
    options = ["--data", "ag-news", "--data-dir", config.data_dir, "--model", config.model, "--meta-per-class", "2"]
    options += ["--steps", "2", "--batch-size", "8", "--meta-batch-size", "4", "--evaluations", "1", "--threads", "1"]
    assert main(["train", "mlrnet", *options, "--out", str(tmp_path / "run")]) == 0
    assert "mlrnet" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2


@pytest.mark.filterwarnings("ignore")
def test_what_classification_does_not_ask_is_frozen(config, folder, tmp_path):
    """BigBird's pooler, which its classification head passes by."""
    bigbird = transformers.BigBirdConfig(**{**small().to_dict(), "attention_type": "original_full"})
    transformers.BigBirdModel(bigbird).save_pretrained(folder)
    model = network_for(make_task(config), 0, config.model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.bert.pooler.weight", "model.bert.pooler.bias"]
    assert all(p.grad is None for p in model.parameters())
    run = train(replace(config, method="l2rw", meta_batch_size=8), tmp_path / "run", progress=False)
    assert all(map(math.isfinite, read_metrics(run.folder / "metrics.csv")["meta_loss"]))


@pytest.mark.filterwarnings("ignore")
def test_a_head_for_as_many_classes_is_kept(folder):
    transformers.BertForSequenceClassification(small(num_labels=4)).save_pretrained(folder)
    stored = transformers.BertForSequenceClassification.from_pretrained(folder)
    assert torch.equal(Encoder(folder, 4).model.classifier.weight, stored.classifier.weight)


@pytest.mark.filterwarnings("ignore")
def test_folders_that_cannot_be_read_are_said(folder):
    transformers.BertForSequenceClassification(small(vocab_size=12)).save_pretrained(folder)
    small().save_pretrained(folder)  # the config of another model
    with pytest.raises(ValueError, match=r"sizes of .*word_embeddings\.weight differ from its config\.json"):
        Encoder(folder, 2)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"--model transformers:.*bert: .*no file named model\.safetensors"):
        Encoder(folder, 2)
    for name in ("vocab.txt", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="there is no tokenizer vocabulary"):
        tokenizer(folder)


def test_a_folder_without_a_model_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        folder_of(f"transformers:{tmp_path}")
    assert folder_of("transformer") is None
