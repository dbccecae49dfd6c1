"""What a method looks at besides its training pass leaves no trace in the running statistics of BatchNorm."""

import pytest
import torch
from torch import nn

from metakern.methods import METHODS, Setting
from metakern.methods.method import Prepared

# Two gradients a step, and a gradient of the clean set: their pages say so. "-es" puts back those of the best moment.
OFTEN = ("metabalance", "sam", "simplifying", "ot-reweighting")
JUDGED = [
    name
    for name, method in METHODS.items()
    if method.fit is None and not name.startswith((*OFTEN, "meta-gcn")) and "-es" not in name
]


@pytest.mark.filterwarnings("ignore:m2m")
@pytest.mark.parametrize("step", [0, 9])
@pytest.mark.parametrize("name", JUDGED)
def test_running_statistics_move_once_a_step(name, step, setup):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    known = setup(model, batch_size=24)
    take = METHODS[name].begin(known)
    if isinstance(take, Prepared):
        take.prepare()
    train, meta = known.task.train.take(torch.arange(12)), known.task.meta
    weight, bias, norm = model[0].weight.detach().clone(), model[0].bias.detach().clone(), model[1]
    take(
        model,
        (train.inputs, train.targets),
        (meta.inputs, meta.targets),
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        setting=Setting(
            torch.tensor([10, 26]), torch.Generator().manual_seed(2), indices=torch.arange(12), step=step, steps=10
        ),
    )
    assert int(norm.num_batches_tracked) == 1
    if name.endswith("-ft") and step == 9:
        fine_tuned = (meta.inputs @ weight.T + bias).mean(0)
        torch.testing.assert_close(norm.running_mean, 0.1 * fine_tuned)


@pytest.mark.parametrize("name", ["cdb", "hard-mining"])
def test_what_is_judged_is_judged_in_evaluation_mode(name, setup):
    """As the published code of CDB measures its accuracies: with dropout the same weights for the same parameters."""
    modes = []
    model = nn.Sequential(nn.Linear(6, 2)).double()
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    known = setup(model)
    train, meta = known.task.train.take(torch.arange(12)), known.task.meta
    METHODS[name].begin(known)(
        model,
        (train.inputs, train.targets),
        (meta.inputs, meta.targets),
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        setting=Setting(torch.tensor([10, 26]), torch.Generator().manual_seed(2), indices=torch.arange(12)),
    )
    assert modes == [False, True]
    assert model.training
