"""Complex numbers inside a model of real parameters: Fourier layers, state spaces, complex features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.testing.catalogue.case import Case, model_case


class FourierLayer(nn.Module):
    """A matrix for each low frequency, written into a spectrum of zeros, beside a pointwise convolution (FNO)."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.spectrum = nn.Linear(1, 4), nn.Parameter(0.5 * torch.randn(4, 4, 3, 2))
        self.pointwise, self.head = nn.Conv1d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lift(x.unsqueeze(-1)).transpose(1, 2)
        given = torch.fft.rfft(hidden)
        made = torch.zeros_like(given)
        made[..., :3] = torch.einsum("bif,iof->bof", given[..., :3], torch.view_as_complex(self.spectrum))
        return self.head(F.gelu(torch.fft.irfft(made, n=x.shape[1]) + self.pointwise(hidden)).mean(-1))


class StateSpace(nn.Module):
    """A long convolution whose kernel comes from a diagonal state space (S4D)."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.frequency = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 4))
        self.output, self.skip = nn.Parameter(torch.randn(2, 4, 2)), nn.Parameter(torch.randn(2))
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        inputs, length = torch.stack([x, x.square()], 1), x.shape[1]
        poles = torch.complex(-self.decay.exp(), self.frequency)
        powers = torch.exp(poles.unsqueeze(-1) * torch.arange(length, device=x.device))
        kernel = torch.einsum("hn,hnl->hl", torch.view_as_complex(self.output), powers).real
        both = torch.fft.rfft(inputs, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        outputs = torch.fft.irfft(both, n=2 * length)[..., :length] + inputs * self.skip.unsqueeze(-1)
        return self.head(F.gelu(outputs).mean(-1))


class Phases(nn.Module):
    """Complex features that real parameters move, turn, conjugate and scale, in place and not."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.imaginary, self.turn = nn.Linear(6, 4), nn.Linear(6, 4), nn.Parameter(torch.randn(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.complex(self.real(x), self.imaginary(x)) + self.turn
        z = (z * torch.exp(1j * self.turn)).conj() * self.turn
        z.mul_(0.5)
        z[:, 0] = z[:, 0] * 2
        return self.head(torch.cat([z.abs(), z.angle()], 1))


SPECTRAL: list[Case] = [
    model_case("fourier-layer", FourierLayer, 8, jvp="exact"),
    model_case("state-space", StateSpace, 8, jvp="exact"),
    model_case("complex-features", Phases, 6, jvp="exact"),
]
