import pytest
import torch

from metakern.data import Examples, Graph, GraphSource, Source
from metakern.data.episodes import Pool, draw_episode, split_classes
from metakern.data.shots import SHOT_SHAPES, shots


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made_up(train: list[int], test: list[int]) -> Source:
    """So many examples of each class; an example's input is its class and a number of its own."""

    def part(counts: list[int], first: int) -> Examples:
        targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        targets = targets[torch.randperm(len(targets), generator=generator(1))]
        numbers = torch.arange(len(targets))
        return Examples(torch.stack([targets, numbers + first], 1).float(), targets, numbers)

    return Source("made-up", part(train, 0), part(test, 10000), tuple(f"c{k}" for k in range(len(train))))


@pytest.mark.parametrize(
    ("shape", "settings", "expected"),
    [
        # The grids of the published settings: 1-9, 3-7 and 4-6 shots of five classes.
        ("linear", {}, [1, 3, 5, 7, 9]),
        ("linear", {"fewest": 3, "most": 7}, [3, 4, 5, 6, 7]),
        ("linear", {"fewest": 4, "most": 6}, [4, 4, 5, 6, 6]),
        ("step", {}, [1, 9, 9, 9, 9]),
        ("step", {"minority": 0.8}, [1, 1, 1, 1, 9]),
        ("step", {"minority": 0.6, "fewest": 2}, [2, 2, 2, 9, 9]),
        ("balanced", {}, [5, 5, 5, 5, 5]),
        ("balanced", {"fewest": 1, "most": 4}, [2, 2, 2, 2, 2]),
        # 9 (8/9 x^3 + 1/9) = 8 x^3 + 1 at x = 0, 1/4, 1/2, 3/4, 1
        ("long-tail", {}, [1, 1, 2, 4, 9]),
        ("long-tail", {"exponent": 1.0}, [1, 3, 5, 7, 9]),
        # 1/49 * 49 falls below 1 in floating point.
        ("long-tail", {"most": 49, "exponent": 2.0}, [1, 4, 13, 28, 49]),
    ],
)
def test_shots_by_hand(shape, settings, expected):
    found = shots(shape, 5, generator(), **settings)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_random_shots_are_uniform_between_fewest_and_most():
    source = generator()
    drawn = torch.cat([shots("random", 5, source, fewest=2, most=4) for _ in range(600)])
    assert torch.bincount(drawn).tolist()[:2] == [0, 0]
    share = torch.bincount(drawn)[2:].double() / len(drawn)
    assert share.tolist() == pytest.approx([1 / 3] * 3, abs=0.03)
    assert torch.equal(shots("random", 5, generator(3)), shots("random", 5, generator(3)))


@pytest.mark.parametrize("shape", SHOT_SHAPES)
def test_every_shape_stays_between_fewest_and_most(shape):
    for way, fewest, most in ((2, 1, 9), (7, 3, 3), (20, 2, 30)):
        found = shots(shape, way, generator(), fewest=fewest, most=most)
        assert len(found) == way
        assert fewest <= int(found.min())
        assert int(found.max()) <= most


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"shape": "round"}, "shape"),
        ({"way": 1}, "way"),
        ({"fewest": 0}, "fewest"),
        ({"fewest": 5, "most": 4}, "most"),
        ({"minority": 1.5}, "minority"),
        ({"exponent": 0.0}, "exponent"),
    ],
)
def test_bad_shots_are_named(settings, named):
    settings = {"shape": "step", "way": 5, **settings}
    with pytest.raises(ValueError, match=named):
        shots(settings.pop("shape"), settings.pop("way"), generator(), **settings)


def members(pool: Pool) -> set[int]:
    return {int(number) for rows in pool.rows for number in pool.examples.ids[rows]}


@pytest.mark.parametrize("seed", range(3))
def test_no_class_and_no_example_in_two_pools(seed):
    source = made_up([30] * 17 + [3] * 3, [10] * 20)
    split = split_classes(source, smallest=20, seed=seed)
    assert [len(pool.classes) for pool in split] == [11, 3, 3]
    assert not set(split.train.classes) & {*split.validation.classes, *split.test.classes}
    assert not set(split.validation.classes) & set(split.test.classes)
    assert not members(split.train) & (members(split.validation) | members(split.test))
    assert not members(split.validation) & members(split.test)
    assert len(split.train.examples.ids.unique()) == len(split.train.examples)
    # What was published to test on, recognised by its inputs, is not trained on, and serves the other classes.
    for pool in split:
        published_to_test = [int((pool.examples.inputs[rows, 1] >= 10000).sum()) for rows in pool.rows]
        assert set(published_to_test) == ({0} if pool is split.train else {10})
        for number, rows in zip(pool.classes, pool.rows, strict=True):
            assert (pool.examples.inputs[rows, 0] == number).all()


def test_a_class_trained_on_is_large_enough_without_the_test_part():
    split = split_classes(made_up([30] * 10 + [10] * 10, [10] * 10 + [30] * 10), smallest=20, held_out=0.1)
    assert all(number < 10 for number in split.train.classes)
    assert len(split.test.classes) == len(split.validation.classes) == 2


def test_the_split_is_seeded():
    source = made_up([30] * 20, [0] * 20)
    assert (
        split_classes(source, smallest=9, seed=4).test.classes == split_classes(source, smallest=9, seed=4).test.classes
    )
    assert (
        split_classes(source, smallest=9, seed=4).test.classes != split_classes(source, smallest=9, seed=5).test.classes
    )


@pytest.mark.parametrize(("settings", "named"), [({"held_out": 0.5}, "held_out"), ({"smallest": 40}, "0 classes")])
def test_a_split_that_cannot_be_is_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        split_classes(made_up([30] * 10, [1] * 10), **{"smallest": 9, **settings})


def test_a_graph_is_refused():
    source, nodes = made_up([30] * 10, [1] * 10), torch.arange(10)
    graph = Graph("ring", torch.ones(10, 1), torch.stack([nodes, nodes]), nodes, nodes[:5], nodes[5:6], nodes[6:])
    with pytest.raises(ValueError, match="ring is a graph"):
        split_classes(GraphSource("ring", source.train, source.test, source.class_names, graph=graph), smallest=5)


def test_an_episode_holds_what_was_asked_for():
    pool = split_classes(made_up([30] * 20, [0] * 20), smallest=24).train
    asked = torch.tensor([1, 3, 5, 7, 9])
    episode = draw_episode(pool, asked, 15, generator(2))
    assert torch.equal(episode.support.counts(5), asked)
    assert episode.query.counts(5).tolist() == [15] * 5
    assert len(set(episode.classes.tolist())) == 5
    drawn = torch.cat([episode.support.ids, episode.query.ids])
    assert len(drawn.unique()) == len(drawn)
    for part in (episode.support, episode.query):
        assert torch.equal(part.inputs[:, 0].long(), episode.classes[part.targets])
    again = draw_episode(pool, asked, 15, generator(2))
    assert torch.equal(again.query.ids, episode.query.ids)
    assert torch.equal(again.support.ids, episode.support.ids)
    assert not torch.equal(draw_episode(pool, asked, 15, generator(3)).query.ids, episode.query.ids)


def test_every_class_can_get_the_fewest_shots():
    pool = split_classes(made_up([12] * 8, [0] * 8), smallest=10, held_out=0.13).train
    source = generator()
    first = {int(draw_episode(pool, torch.tensor([1, 9]), 1, source).classes[0]) for _ in range(100)}
    assert first == set(pool.classes)


def test_episodes_that_cannot_be_are_refused():
    pool = split_classes(made_up([12] * 8, [0] * 8), smallest=10, held_out=0.13).train
    with pytest.raises(ValueError, match="7 classes"):
        draw_episode(pool, torch.ones(7, dtype=torch.int64), 1, generator())
    with pytest.raises(ValueError, match="12 examples"):
        draw_episode(pool, torch.tensor([1, 9]), 4, generator())
