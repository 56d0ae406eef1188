"""How long links are: tokens, minutes, and links that end when they have stopped to learn."""

from __future__ import annotations

import json

import pytest
from helpers import assert_same_links, settings

from chainlora import make_config, train


def planned(tiny_folder, sentiment, output, **chain):
    """Train with a chain of its own length; return the result."""
    keys = {"ranks": [2, 2]} | chain
    return train(make_config(settings(tiny_folder, sentiment, output, chain=keys)))


def steps_of(result) -> list[int]:
    return [link["num_steps"] for link in result["links"]]


def test_tokens_are_read_by_whole_steps(tiny_folder, sentiment, tmp_path):
    """A link ends with the step that reaches its tokens, also an epoch later."""
    rows = [{"prompt": f"{'good ' * (k % 7)}bad", "completion": " film"} for k in range(20)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    seen = []

    def steps(name: str, **length) -> list[int]:
        keys = {"steps": None} | length | {"ranks": [2, 2]}
        tree = settings(tiny_folder, sentiment, tmp_path / name, chain=keys)
        config = make_config(tree | {"data": {"train": str(file)}})
        return steps_of(train(config, listener=seen.append))

    assert steps("steps", steps=[4, 5]) == [4, 5]  # three steps an epoch
    epoch = next(event for event in seen if event.name == "plan").data["train"]["tokens"]
    assert steps("whole", tokens=[epoch, epoch]) == [3, 3]
    assert steps("more", tokens=[epoch + 1, 2 * epoch - 1]) == [4, 5]
    assert_same_links(tmp_path / "more", tmp_path / "steps")


def test_minutes_become_steps_that_are_kept(tiny_folder, sentiment, tmp_path, monkeypatch):
    """The lengths are fixed once: a run that is resumed keeps them, however fast it is now."""
    config = make_config(
        settings(
            tiny_folder,
            sentiment,
            tmp_path / "run",
            chain={"ranks": [2, 2], "steps": None, "minutes": [0.002, 0.001]},
            train={"save_every": 1},
        )
    )

    def stop(event) -> None:
        if event["event"] == "plan":
            lengths.append(event["lengths"])
        if event["event"] == "step" and event["step"] == 1:
            raise KeyboardInterrupt

    lengths: list[list[int]] = []
    with pytest.raises(KeyboardInterrupt):
        train(config, listener=stop)
    monkeypatch.setattr("chainlora.training.deciding.measure_step", lambda run: 1e-9)
    result = train(config, resume=True, listener=lambda event: None)
    assert steps_of(result) == lengths[0]
    assert lengths[0][0] >= lengths[0][1] >= 1
    # Nothing of the measuring is left: the same steps asked for by number give the same links.
    planned(tiny_folder, sentiment, tmp_path / "steps", steps=lengths[0])
    assert_same_links(tmp_path / "run", tmp_path / "steps")


@pytest.mark.parametrize(("of", "dies_at"), [("norm", None), ("norm", 3), ("loss", 5)])
def test_a_link_ends_at_a_plateau(tiny_folder, sentiment, tmp_path, of, dies_at):
    """With a rate of almost nothing neither the norm nor the loss moves by half: the first link
    ends at the second comparison, the last one has the rest. Also where the run is killed."""
    config = make_config(
        settings(
            tiny_folder,
            sentiment,
            tmp_path / "run",
            chain={
                "ranks": [2, 2],
                "steps": [8, 3],
                "plateau": {"of": of, "patience": 2, "min_change": 0.6},
            },
            data={"num_train": 8},  # every step has all rows, so that the gradient stays the same
            train={"lr": 1e-6, "save_every": 1, "schedule": "constant"},
        )
    )

    def die(event) -> None:
        if event["event"] == "step" and event["step"] == dies_at:
            raise KeyboardInterrupt

    if dies_at is not None:
        with pytest.raises(KeyboardInterrupt):
            train(config, listener=die)
    found = steps_of(train(config, resume=dies_at is not None))
    assert sum(found) == 11
    # The norm of B·A grows linearly at first (B = 0): from 2 to 4 steps it doubles, from 4 to 6 it
    # grows by half, which is less than 0.6 of what it was. The loss does not move at all.
    assert found[0] == {"norm": 6, "loss": 4}[of]
    whole = settings(
        tiny_folder,
        sentiment,
        tmp_path / "planned",
        chain={"ranks": [2, 2], "steps": found},
        data={"num_train": 8},
        train={"lr": 1e-6, "schedule": "constant"},
    )
    train(make_config(whole))
    assert_same_links(tmp_path / "run", tmp_path / "planned")


def test_shares_follow_the_rate(tiny_folder, sentiment, tmp_path):
    """Those of the next step's rate: they end with the schedule, a restarted one begins anew."""
    soft = {"every": 2, "share": 0.5, "follow_rate": True}
    chain = {"ranks": [2, 2], "steps": [6, 5], "knots": soft}
    seen = []
    config = settings(tiny_folder, sentiment, tmp_path / "run", chain=chain)
    train(make_config(config), listener=seen.append)
    shares = [(event.step, event.share) for event in seen if event.name == "soft_knot"]
    expected = [(step, 0.5 * (1 - step / 11)) for step in (2, 4, 8, 10)]  # 6 ends a link
    assert [step for step, _ in shares] == [step for step, _ in expected]
    assert [share for _, share in shares] == pytest.approx([share for _, share in expected])
