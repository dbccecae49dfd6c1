"""Collects the finished runs of run.sh into expected.csv and prints the tables of the README: python table.py [OUT]."""

import csv
import json
import statistics
import sys
from pathlib import Path

METHODS = ("uniform", "random", "mw-net", "mlc", "glc", "mlrnet")

# Yu and Li 2024, table 1 (marked *: twelve layers of a pretrained BERT) and table 4 (three layers).
BIASES = {
    "imbalance10": {"uniform": "90.58*", "mw-net": "91.48*", "mlc": "91.91*", "mlrnet": "92.15*"},
    "imbalance20": {"uniform": "89.33*", "mw-net": "90.20*", "mlc": "88.75*", "mlrnet": "89.95*"},
    "imbalance50": {"uniform": "85.21*", "mw-net": "87.79*", "mlc": "78.63*", "mlrnet": "90.07*"},
    "imbalance100": {"uniform": "81.18*", "mw-net": "84.58*", "mlc": "75.41*", "mlrnet": "88.47*"},
    "imbalance200": {"uniform": "69.01*", "mw-net": "80.37*", "mlc": "73.87*", "mlrnet": "83.22*"},
    "uniform0.2": {"uniform": "92.19*", "mw-net": "93.27*", "mlc": "93.70*", "mlrnet": "94.10*"},
    "uniform0.4": {"uniform": "90.13*", "mw-net": "91.23*", "mlc": "91.76*", "mlrnet": "92.38*"},
    "imbalance20-uniform0.4": {"uniform": "86.18", "mw-net": "88.12", "mlrnet": "89.71"},
    "flip0.4": {},
}
# The same after pretraining on the training texts, which the paper's classifier had on others.
PRETRAINED = {f"pretrained-{name}": paper for name, paper in BIASES.items()}
# Table 5, imbalance 20 and noise 0.4: accuracy by the number of clean texts of each class.
CLEAN = {
    "imbalance20-uniform0.4-meta10": "87.11",
    "imbalance20-uniform0.4-meta50": "87.25",
    "imbalance20-uniform0.4-meta200": "89.71",
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
    rows = [["bias", "method", "seeds", "accuracy", "deviation", "paper"]]
    print("| bias | method | accuracy, % | the paper's |\n|---|---|---|---|")
    for bias, paper in {**BIASES, **PRETRAINED, **{name: {"mlrnet": theirs} for name, theirs in CLEAN.items()}}.items():
        found = accuracies(root / bias)
        for method in METHODS:
            values = found.get(method, [])
            if len(values) < 2:
                continue
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            theirs = paper.get(method, "-")
            rows.append([bias, method, str(len(values)), f"{mean:.2f}", f"{deviation:.2f}", theirs])
            print(f"| {bias} | `{method}` | {mean:.2f} ± {deviation:.2f} ({len(values)}) | {theirs} |")
    with (Path(__file__).parent / "expected.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
