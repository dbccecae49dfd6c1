"""Two-class tables: credit-card fraud, credit-card default, Haberman's survival."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch

from metakern.data.examples import Examples, Source
from metakern.data.folder import find_file
from metakern.data.split import standardised, stratified


def _source(name: str, features: np.ndarray, targets: np.ndarray, class_names: tuple[str, str]) -> Source:
    """A fifth of each class, the same in every run, is the test set; features are standardised by the training set.

    Class 0 is always the rare one: the imbalance generator makes class 1 the majority.
    """
    inputs, labels = torch.from_numpy(features).float(), torch.from_numpy(targets).long()
    train_rows, test_rows = stratified(labels, 2)
    inputs = standardised(inputs, train_rows)
    training = Examples(inputs[train_rows], labels[train_rows], train_rows)
    return Source(name, training, Examples(inputs[test_rows], labels[test_rows], test_rows), class_names)


def _csv_columns(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    head = [name.strip().strip('"') for name in rows[0]]
    return head, np.array([[float(value.strip().strip('"')) for value in row] for row in rows[1:]])


def credit_fraud(root: Path | None, *, first_hours: bool = False) -> Source:
    """Credit-card transactions: fraud (class 0) against genuine (class 1); 29 features, without Time.

    Reads `creditcard.csv` as published, or the subset `creditcard_fraud_subset.npz`, of which only the genuine
    transactions spread over both days are used (pool 0); with `first_hours`, also those of its first hours alone (pools
    1 and 2), whose time may distinguish them from the frauds.
    Source: Dal Pozzolo et al., "Calibrating Probability with Undersampling for Unbalanced Classification", CIDM 2015.
    """
    path = find_file(
        root,
        ("tabular", "."),
        ("creditcard.csv", "creditcard_fraud_subset.npz"),
        data="credit-card fraud",
        form="CSV with the header Time, V1..V28, Amount, Class",
        published="https://www.kaggle.com/datasets/mlg-ulb/creditcardfraud",
    )
    if path.suffix == ".csv":
        _, values = _csv_columns(path)
        features, fraud = values[:, 1:-1], values[:, -1] == 1
    else:
        with np.load(path, allow_pickle=False) as stored:
            usable = np.isin(stored["pool"], (0, 1, 2, 3) if first_hours else (0, 3))
            features, fraud = stored["X"][usable, 1:], stored["y"][usable] == 1
    # The published table lists some transactions twice; a copy must not stand in training and in the test set.
    _, first = np.unique(features, axis=0, return_index=True)
    first.sort()
    features, fraud = features[first], fraud[first]
    name = "credit-fraud-all" if first_hours else "credit-fraud"
    return _source(name, features, (~fraud).astype(np.int64), ("fraud", "genuine"))


def credit_default(root: Path | None) -> Source:
    """Credit-card clients: default next month (class 0) against paid (class 1); 23 features.

    Source: Yeh, Lien, Expert Systems with Applications 36(2), 2009; UCI repository.
    """
    path = find_file(
        root,
        ("tabular", "."),
        ("credit_default.npz", "UCI_Credit_Card.csv"),
        data="credit default",
        form="CSV with the header ID, LIMIT_BAL, ..., PAY_AMT6, default; or npz with X [n, 23] and y [n]",
        published="https://archive.ics.uci.edu/dataset/350/default+of+credit+card+clients",
    )
    if path.suffix == ".csv":
        _, values = _csv_columns(path)
        features, default = values[:, 1:-1], values[:, -1] == 1
    else:
        with np.load(path, allow_pickle=False) as stored:
            features, default = stored["X"], stored["y"] == 1
    return _source("credit-default", features.astype(np.float64), (~default).astype(np.int64), ("default", "paid"))


def haberman(root: Path | None) -> Source:
    """Patients after breast-cancer surgery: died within five years (class 0) against survived (class 1); 3 features.

    Source: Haberman, "Generalized Residuals for Log-Linear Models", 1976; UCI repository.
    """
    path = find_file(
        root,
        ("tabular", "."),
        ("haberman.csv", "haberman.data"),
        data="Haberman's survival",
        form="CSV: age, year of operation, positive nodes, status (1 survived, 2 died), with or without a header",
        published="https://archive.ics.uci.edu/dataset/43/haberman+s+survival",
    )
    lines = [line for line in path.read_text().splitlines() if line and line[0].isdigit()]
    values = np.array([[float(value) for value in line.split(",")] for line in lines])
    return _source("haberman", values[:, :-1], (values[:, -1] == 1).astype(np.int64), ("died", "survived"))
