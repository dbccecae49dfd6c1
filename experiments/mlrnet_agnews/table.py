"""Collects the finished runs of run.sh into expected.csv and prints the table of the README: python table.py [OUT]."""

import csv
import json
import statistics
import sys
from pathlib import Path

# Accuracy with three layers of a pretrained BERT, Yu and Li 2024, tables 1 and 4 (table 1: twelve layers).
PAPER = {
    ("20", "0.4"): {"uniform": "86.18", "mw-net": "88.12", "mlrnet": "89.71"},
    ("20", "0"): {"uniform": "89.33*", "mw-net": "90.20*", "mlrnet": "89.95*"},
    ("1", "0.4"): {"uniform": "90.13*", "mw-net": "91.23*", "mlrnet": "92.38*"},
}


def accuracies(folder: Path) -> dict[str, list[float]]:
    """Test accuracy in percent of every finished run, by method."""
    found: dict[str, list[float]] = {}
    for path in sorted(folder.glob("cells/*/result.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["identity"]["method"], []).append(100 - result["test_error"])
    return found


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/mlrnet_agnews")
    rows = [["imbalance", "noise", "method", "seeds", "accuracy", "deviation", "paper"]]
    print("| imbalance | noise | method | accuracy, % | the paper's |\n|---|---|---|---|---|")
    for (factor, rate), paper in PAPER.items():
        found = accuracies(root / f"imbalance{factor}-noise{rate}")
        for method in ("uniform", "random", "mw-net", "mlrnet"):
            values = found.get(method, [])
            if len(values) < 2:
                continue
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            theirs = paper.get(method, "-")
            rows.append([factor, rate, method, str(len(values)), f"{mean:.2f}", f"{deviation:.2f}", theirs])
            print(f"| {factor} | {rate} | `{method}` | {mean:.2f} ± {deviation:.2f} ({len(values)}) | {theirs} |")
    with (Path(__file__).parent / "expected.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
