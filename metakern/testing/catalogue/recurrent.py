"""Recurrent layers: whole, by cells, in both directions, packed."""

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from metakern.testing.catalogue.case import Case, layer_case


class Recurrent(nn.Module):
    """A recurrent layer's outputs."""

    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        if self.cell.batch_first:
            return self.cell(x)[0]
        return self.cell(x.transpose(0, 1))[0].transpose(0, 1)


class Packed(nn.Module):
    """The last outputs of sequences of different lengths, packed; unsorted, so that packing reorders the examples."""

    def __init__(self, cell: nn.RNNBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        lengths = 2 + (x[:, 0, 0] > 0).long() + (x[:, 0, 1] > 0).long()
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.cell(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class Cells(nn.Module):
    """Recurrence by hand: an LSTM cell and a GRU cell, called once per position."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(4, 3), nn.GRUCell(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        state, hidden = None, x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            state = self.lstm(x[:, t], state)
            hidden = self.gru(state[0], hidden)
        return hidden


RECURRENT: list[Case] = [
    layer_case("rnn", lambda: Recurrent(nn.RNN(4, 3, batch_first=True)), 5, 4),
    layer_case("rnn-relu-bidirectional", lambda: Recurrent(nn.RNN(4, 3, 2, "relu", bidirectional=True)), 5, 4),
    layer_case("gru", lambda: Recurrent(nn.GRU(4, 3, 2, batch_first=True)), 5, 4),
    layer_case("gru-bidirectional", lambda: Recurrent(nn.GRU(4, 3, batch_first=True, bidirectional=True)), 5, 4),
    layer_case("gru-no-bias", lambda: Recurrent(nn.GRU(4, 3, bias=False, batch_first=True)), 5, 4),
    layer_case("lstm", lambda: Recurrent(nn.LSTM(4, 3, batch_first=True)), 5, 4),
    layer_case("lstm-bidirectional", lambda: Recurrent(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True)), 5, 4),
    layer_case("lstm-time-major", lambda: Recurrent(nn.LSTM(4, 3)), 5, 4),
    # Packed rows are in no order that a fold of the batch gives: forward mode serves them.
    layer_case("lstm-packed", lambda: Packed(nn.LSTM(4, 3, batch_first=True)), 5, 4, ghost="either", jvp="exact"),
    layer_case(
        "gru-packed-bidirectional",
        lambda: Packed(nn.GRU(4, 3, batch_first=True, bidirectional=True)),
        *(5, 4),
        ghost="either",
        jvp="exact",
    ),
    layer_case("cells", Cells, 5, 4),
]
