"""The speed benchmarks at their smallest: that they run, and that what they compare says the same."""

import json

import numpy as np
import pytest
import results
import roofline
import sampler
import speed
import torch
from serial import SerialSampler

from vlm_agents.models import HFSampler, load_agent

SMALL = ("env=number_line", "env.max_steps=2", "stage.episodes=2", "stage.num_envs=2", "hardware.threads=1")


@pytest.fixture(autouse=True)
def somewhere_else(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.json")


def test_speed_against_rl4vlms_way_is_told_and_with_settings_not_kept(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["speed.py", "--repeats=1", "--serial-episodes=1", "--threads=1", *SMALL])
    speed.main()
    shown = capsys.readouterr().out
    told = json.loads(shown[shown.index("{") :])
    assert set(told) == {"rollout_vs_serial", "update_vs_serial", "iteration_vs_serial"}
    assert all(ratio > 0 for ratio in told.values())
    assert not results.RESULTS.exists()


def test_rl4vlms_way_finds_the_log_probs_and_values_that_our_sampler_had():
    cfg = speed.composed("stage=ppo", "name=small", *SMALL)
    agent = load_agent(cfg.model, cfg.hardware)
    agent.banned.fill_(False)  # theirs are over the whole vocabulary
    episodes, _ = speed.played(cfg, HFSampler(agent), 2, 2)
    serial = SerialSampler(agent)
    for turn in (turn for episode in episodes for turn in episode.turns):
        images = [image for message in turn.prompt for image in message.images]
        reply = turn.reply
        with torch.no_grad():
            logprobs, value = serial.evaluate(reply.prompt_token_ids, reply.token_ids, images, longest=64)
        np.testing.assert_allclose(logprobs, reply.logprobs, rtol=1e-5, atol=1e-5)
        assert float(value) == pytest.approx(reply.value, rel=1e-5, abs=1e-5)


def test_sampler_against_generate_is_told(monkeypatch, capsys):
    words = ["--repeats=1", "--turns=1", "--envs=2", "--new-tokens=4", "--threads=1", "hardware.threads=1"]
    monkeypatch.setattr("sys.argv", ["sampler.py", *words])
    sampler.main()
    assert "generate, then log-probs" in capsys.readouterr().out
    assert not results.RESULTS.exists()


def test_shares_of_what_the_device_could_do_lie_between_none_and_all_of_it():
    shares = roofline.shares(speed.composed(*roofline.START, *SMALL))
    assert len(shares) == 2
    assert all(0 < share < 1 for share in shares.values())


def test_products_of_matrices_in_an_attention_are_counted_on_a_cpu_too():
    query, key, value = (torch.zeros(2, 3, length, 8, requires_grad=True) for length in (5, 7, 7))
    with roofline.counting() as counter:
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        assert counter.get_total_flops() == 2 * 2 * 3 * 5 * 7 * 8 * 2  # two products of 2 x 3 heads, 5 x 8 by 8 x 7
        found.sum().backward()
    assert counter.get_total_flops() == 7 / 2 * (2 * 2 * 3 * 5 * 7 * 8 * 2)  # and five in the backward pass
