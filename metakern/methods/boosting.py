"""Multi-class AdaBoost (SAMME), with decision stumps or with the run's own network as the weak learner."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.methods.method import Method, NotApplicable, Setup, no_steps
from metakern.methods.plain_training import predict, train_plainly


class Round(NamedTuple):
    """Result of one boosting round: the vote of its learner, and the example weights[n] of the next round."""

    vote: float
    weights: Tensor
    last: bool


def samme_round(weights: Tensor, wrong: Tensor, classes: int) -> Round:
    """err = sum_n w_n [wrong_n]; vote = ln((1 - err) / err) + ln(C - 1); wrong examples: w_n e^vote; then sum 1.

    Boosting ends with a learner that makes no error, which has the vote 1, and with one that is no better than chance,
    err >= 1 - 1 / C, which has the vote 0.
    Source: Zhu, Zou, Rosset, Hastie, "Multi-class AdaBoost", Statistics and Its Interface 2009, algorithm 2.
    """
    error = float((weights * wrong).sum() / weights.sum())
    if error <= 0:
        return Round(1.0, weights, True)
    if error >= 1 - 1 / classes:
        return Round(0.0, weights, True)
    vote = math.log((1 - error) / error) + math.log(classes - 1)
    grown = torch.where(wrong.bool(), weights * math.exp(vote), weights)
    return Round(vote, grown / grown.sum(), False)


class Vote(nn.Module):
    """inputs[n, ...] -> votes[n, C]: each network adds its vote to the class that it predicts."""

    votes: Tensor

    def __init__(self, networks: list[nn.Module], votes: list[float], classes: int) -> None:
        super().__init__()
        self.networks, self.classes = nn.ModuleList(networks), classes
        self.register_buffer("votes", torch.tensor(votes))

    def forward(self, inputs: Tensor) -> Tensor:
        said = torch.stack([F.one_hot(network(inputs).argmax(1), self.classes) for network in self.networks])
        return torch.einsum("k,knc->nc", self.votes.to(said.device), said.to(self.votes.dtype))


def boosted_networks(setup: Setup, *, rounds: int = 5) -> Vote:
    """SAMME with the run's network: `rounds` networks from the initial parameters, which share the run's steps."""
    train = setup.task.train
    weights = torch.full((len(train),), 1 / len(train), dtype=torch.float64, device=train.targets.device)
    networks, votes = [], []
    for k in range(rounds):
        # Of mean 1, so that the step has the size of a plain one.
        scaled, steps = weights * len(weights), max(1, setup.steps // rounds)
        network = train_plainly(setup, train, steps=steps, weights=scaled, seed=setup.seed + 10 + k)
        vote, weights, last = samme_round(
            weights, predict(network, train.inputs).argmax(1) != train.targets, setup.classes
        )
        # The first network speaks even if it is no better than chance: there is no other.
        if vote > 0 or not networks:
            networks.append(network)
            votes.append(vote or 1.0)
        if last:
            break
    return Vote(networks, votes, setup.classes)


class Fitted(nn.Module):
    """inputs[n, ...] -> log probabilities[n, C] of a fitted scikit-learn classifier on flattened inputs."""

    def __init__(self, classifier: Any, classes: int) -> None:
        super().__init__()
        self.classifier, self.classes = classifier, classes

    def forward(self, inputs: Tensor) -> Tensor:
        known = torch.from_numpy(self.classifier.predict_proba(inputs.flatten(1).cpu().numpy()))
        whole = known.new_zeros(len(inputs), self.classes)
        whole[:, torch.from_numpy(self.classifier.classes_)] = known
        return whole.clamp(min=1e-12).log().to(inputs)


def boosted_stumps(setup: Setup, *, rounds: int = 200) -> Fitted:
    """scikit-learn's AdaBoost (SAMME) with decision stumps. The run's steps and optimizer are not used.

    Raises: NotApplicable for inputs that are not numbers.
    """
    from sklearn.ensemble import AdaBoostClassifier
    from sklearn.tree import DecisionTreeClassifier

    train = setup.task.train
    if not train.inputs.is_floating_point():
        raise NotApplicable(
            f"adaboost needs inputs that are numbers; {setup.task.name} has {train.inputs.dtype} tokens"
        )
    classifier = AdaBoostClassifier(DecisionTreeClassifier(max_depth=1), n_estimators=rounds, random_state=setup.seed)
    return Fitted(classifier.fit(train.inputs.flatten(1).cpu().numpy(), train.targets.cpu().numpy()), setup.classes)


ADABOOST = Method(
    "adaboost",
    "SAMME on 200 decision stumps, by scikit-learn",
    "Freund, Schapire, 1997; Zhu et al., 2009",
    no_steps,
    fit=boosted_stumps,
)
ADABOOST_NETWORKS = Method(
    "adaboost-networks",
    "SAMME on five of the run's networks, which share its steps",
    "Zhu et al., 2009",
    no_steps,
    fit=boosted_networks,
)
