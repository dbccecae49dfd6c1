"""What a step would cost for a model and its batches, per use and in total: a value that prints as a table."""

from __future__ import annotations

from dataclasses import dataclass

from metakern.planning.pass_counts import NONE, Passes
from metakern.planning.peak_memory import Memory


@dataclass(frozen=True)
class UseCost:
    """One use of parameters in the train pass."""

    parameters: str  # names; "transpose(head.weight)" for a tensor made from a parameter
    function: str  # the torch function called, or the registered module
    rule: str  # the layer rule that handles it; "generic" is forward mode through this call alone
    form: str  # "direction", with the meta gradient V, or "pairs", with the records of the meta batch
    why: str  # reason for that form
    output: tuple[int, ...]
    dots_flops: int  # of products, as torch counts them, without elementwise work
    gradient_flops: int  # the same, if every example is kept
    kept_bytes: int  # A and B that no earlier use keeps, held by memory="reuse" until dots or gradient; of one part


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str(explanation)` is a table."""

    engine: str
    why_not_ghost: str  # "" if ghost runs; otherwise there are no uses
    uses: tuple[UseCost, ...]
    passes: Passes = NONE  # NONE if neither ghost nor forward mode can run
    memory: Memory | None = None  # peaks; None if no engine can run
    micro_batch: int | None = None  # examples of a part, if a batch is larger

    @property
    def plain_flops(self) -> int:
        """FLOPs of a plain step: forward, output gradients, gradients of the parameters."""
        if self.passes.plain:
            return self.passes.plain
        gradient = sum(use.gradient_flops for use in self.uses)
        return self.passes.forward + self.passes.backward + gradient

    def step_flops(self, kept: float = 0.5) -> float:
        """FLOPs of `l2rw_step` if the share `kept` of the batch has non-zero weight; with parts, if each has some."""
        once = sum(self.passes) - self.passes.plain + sum(use.dots_flops for use in self.uses)
        if self.micro_batch is not None:
            return once + self.plain_flops
        return once + kept * sum(use.gradient_flops for use in self.uses)

    @property
    def kept_bytes(self) -> int:
        """Bytes that all records hold until the gradient is formed; memory="two_pass" holds no output gradients."""
        return sum(use.kept_bytes for use in self.uses)

    def share(self, use: UseCost) -> float:
        """Share of one use in the FLOPs of all dots and weighted gradients."""
        total = sum(each.dots_flops + each.gradient_flops for each in self.uses)
        return (use.dots_flops + use.gradient_flops) / total if total else 0.0

    def __str__(self) -> str:
        if self.why_not_ghost:
            steps = f"; {self.step_flops() / self.plain_flops:.2f} plain steps" if self.plain_flops else ""
            served = f"engine: {self.engine}, for the whole model at once ({self.why_not_ghost}){steps}"
            return "\n".join([served, *self._peaks()])
        rows = [["parameters", "function", "rule", "form", "dots MFLOP", "gradient", "kept KiB", "share", "why"]]
        for use in self.uses:
            sizes = [_rounded(v) for v in (use.dots_flops / 1e6, use.gradient_flops / 1e6, use.kept_bytes / 1024)]
            named = [use.parameters, use.function, use.rule, use.form]
            rows.append([*named, *sizes, f"{self.share(use):.1%}", use.why])
        widths = [max(len(row[k]) for row in rows) for k in range(8)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]) for row in rows]
        parts = "" if self.micro_batch is None else f", {self.micro_batch} examples at a time"
        return "\n".join([*lines, self._operations(), *self._peaks(), f"engine: {self.engine}{parts}"])

    def _operations(self) -> str:
        half, none, every = (self.step_flops(kept) / max(self.plain_flops, 1) for kept in (0.5, 0, 1))
        if self.micro_batch is not None:
            return f"operations: {every:.2f} plain steps where every part carries weight"
        shares = f"{half:.2f} plain steps with half of the batch kept ({none:.2f} with none, {every:.2f} with all)"
        return f"operations: {shares}"

    def _peaks(self) -> list[str]:
        if self.memory is None:
            return [f"memory: records of {self.kept_bytes / 2**20:.3g} MiB"] if self.uses else []
        plain, *phases, two_pass = (_rounded(size / 2**20) for size in self.memory)
        named = ", ".join(f"{name} {size}" for name, size in zip(Memory._fields[1:], phases))
        peak = f"{_rounded(self.memory.reuse / 2**20)} MiB ({named}); a plain step {plain}, two_pass {two_pass}"
        return [f"peak memory: {peak}"]


def _rounded(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
