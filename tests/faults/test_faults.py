"""Every command at every kind of fault: a sample, or with ``CHAINLORA_FULL=1`` each file operation.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable

import pytest
from commands import COMMANDS, FAULTS, World, disturb, make_world

FULL = bool(os.environ.get("CHAINLORA_FULL"))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterable[World]:
    """A world of tiny runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHAINLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield make_world(tmp_path_factory.mktemp("faults"))


def try_places(world: World, command: str, kind: str, count: int) -> None:
    """Disturb a command at some operations, drawn by chance but always the same."""
    operations = world.whole(command).operations
    places = range(len(operations))
    if count < len(places):
        places = sorted(random.Random(f"{command} {kind}").sample(places, count))
    for place in places:
        wrong = disturb(world, command, kind, place)
        assert not wrong, f"{kind} at {place}, {operations[place]}: {wrong}"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "count", [2, pytest.param(10**6, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_command_that_was_killed_is_typed_again(world, command, count):
    try_places(world, command, "kill", count)
