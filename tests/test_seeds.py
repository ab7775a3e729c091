"""Which numbers stand for which episodes, for ever; and that members of one seed draw apart."""

import numpy as np

from vlm_agents.seeds import Deal, held_out, panel_seeds, training_seed


def test_seeds_are_the_same_everywhere():
    """Panels are part of published figures: these numbers must never change."""
    assert panel_seeds("MiniGrid-DoorKey-6x6-v0", 3) == [2145963788, 1606605208, 1239217993]
    assert training_seed(0, 1, 2) == 507423221


def test_panels_and_training_never_meet():
    training = {
        training_seed(run, iteration, episode) for run in range(3) for iteration in range(20) for episode in range(20)
    }
    panel = panel_seeds("a", 1000)
    assert len(training) == 1200
    assert len(set(panel)) == 1000
    assert max(training) < 2**30 <= min(panel)
    assert max(panel) < 2**31
    assert panel_seeds("a", 10) == panel[:10]
    assert not set(panel_seeds("b", 1000)) & set(panel)


def test_held_out_are_the_panels_alone():
    assert all(map(held_out, panel_seeds("a", 100)))
    assert not any(held_out(training_seed(0, 0, episode)) for episode in range(100))


def test_a_member_of_0_draws_what_a_seed_alone_would():
    """NumPy pads what it is seeded with by zeros: runs from before there were members go on as they began."""
    for run_seed, seed in ((0, 0), (7, 123), (2**32 - 1, 2**31 - 1)):
        alone, first, second = (
            np.random.default_rng(words).random(4)
            for words in ([run_seed, seed], [run_seed, *Deal(seed)], [run_seed, *Deal(seed, 1)])
        )
        assert (first == alone).all()
        assert (second != alone).all()
