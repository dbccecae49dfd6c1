from metakern.methods import METHODS
from metakern.trainers.step_costs import measure, read_costs


def test_the_file_is_read_without_its_first_line(tmp_path):
    path = tmp_path / "costs.csv"
    path.write_text("# a machine\nmethod,ratio,low,high\nl2rw,1.5,1.4,1.6\n")
    assert read_costs(path) == {"l2rw": 1.5}


def test_what_is_shipped_is_of_methods_that_there_are():
    costs = read_costs()
    assert set(costs) <= set(METHODS)
    assert {"uniform", "l2rw", "mw-net"} <= set(costs)
    assert all(cost > 0 for cost in costs.values())


def test_a_method_for_two_classes_is_measured_on_two(capsys):
    measured = measure("proportion-as-shipped", pairs=2)
    assert measured is not None
    assert "needs two classes" in capsys.readouterr().err
