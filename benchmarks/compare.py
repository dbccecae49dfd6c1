"""One case, all providers: check, count, time; rows and a table come out."""

from benchmarks.cases import Case, Problem, problem_of
from benchmarks.gate import Gate, Shares
from benchmarks.measure import count, interleaved
from benchmarks.providers import Outcome, Step, providers_for
from benchmarks.rows import Row


def compare(case: Case, *, device: str = "cpu", seconds: float = 10.0, only: list[str] | None = None) -> list[Row]:
    """Rows of all providers of a case; one that stops or fails its check gets a row that says so, and no time."""
    problem = problem_of(case, device)
    gate = Gate(problem)
    steps: dict[str, Step] = {}
    shares: dict[str, Shares] = {}
    outcomes: dict[str, Outcome] = {}
    counts: dict[str, tuple[int, int]] = {}
    rows: dict[str, Row] = {}
    chosen = {name: make for name, make in providers_for(problem).items() if not only or name in ("plain", *only)}
    for name, prepare in chosen.items():
        try:
            step = prepare(problem)
            step()  # what is learnt once per model is no part of a step
            outcomes[name], *counted = count(step, device)
            counts[name] = (counted[0], counted[1])
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:160]
            rows[name] = _row(problem, name, reason if reason.startswith("not run") else f"stops: {reason}")
            continue
        shares[name] = gate.judge(outcomes[name])
        if shares[name].green:
            steps[name] = step
        else:
            rows[name] = _row(problem, name, f"over the error budget: {shares[name]}")
    timings = interleaved(steps, unit="plain", seconds=seconds, device=device)
    for name, timing in timings.items():
        weights = outcomes[name].weights
        operations, peak = counts[name]
        rows[name] = Row(
            **_identity(problem, name),
            status="measured",
            engine=outcomes[name].engine,
            kept=None if weights is None else float((weights > 0).double().mean()),
            rounds=timing.rounds,
            milliseconds=timing.milliseconds,
            ratio=timing.ratio,
            ratio_p20=timing.ratio_p20,
            ratio_p80=timing.ratio_p80,
            processor_ratio=timing.processor_ratio,
            gigaflops=operations / 1e9,
            flop_ratio=operations / counts["plain"][0],
            peak_megabytes=peak / 2**20,
            peak_ratio=peak / counts["plain"][1],
            dots_budget_used=shares[name].dots,
            gradient_budget_used=shares[name].gradient,
        )
    problem.model.zero_grad(set_to_none=True)
    return [rows[name] for name in chosen]


def _identity(problem: Problem, provider: str) -> dict[str, str]:
    case = problem.case
    return {
        "case": case.name,
        "shapes": case.shapes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "provider": provider,
    }


def _row(problem: Problem, provider: str, status: str) -> Row:
    return Row(**_identity(problem, provider), status=status)


def table(rows: list[Row], prototypes: dict[str, float | None] | None = None) -> str:
    """Ratios to the plain step, with spread, operations and memory; one block per case."""
    heads = ("plain steps", "spread", "cpu", "ms", "flops", "peak", "kept")
    widths = (12, 18, 8, 9, 8, 8, 7)
    lines = [f"{'case':<18}{'provider':<24}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))]
    previous = ""
    for row in rows:
        label = row.case if row.case != previous else ""
        previous = row.case
        start = f"{label:<18}{row.provider:<24}"
        if not row.measured:
            lines.append(f"{start}  {row.status}")
            continue
        cells = (
            f"{row.ratio:.2f}",
            f"{row.ratio_p20:.2f} - {row.ratio_p80:.2f}",
            f"{row.processor_ratio:.2f}",
            f"{row.milliseconds:.1f}",
            f"{row.flop_ratio:.2f}",
            f"{row.peak_ratio:.2f}",
            "" if row.kept is None else f"{row.kept:.2f}",
        )
        lines.append(start + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
        prototype = (prototypes or {}).get(row.case)
        if row.provider == "metakern" and prototype:
            lines[-1] += f"   to beat {prototype:.2f}"
    return "\n".join(lines)
