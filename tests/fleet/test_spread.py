"""What is remembered of the hosts of a VNE."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

import qsnap
from qsnap.fleet.spread import remember, remembered, spread_of, spreads
from qsnap.model import VM, VNE, Host

VNE_ON_TWO = VNE(
    "lab",
    (VM("x", 1, host="a"), VM("y", 1, host="b")),
    hosts=(Host("a", "10.0.0.1", 7907, "10.0.0.1"), Host("b", "10.0.0.2", 7907, "10.0.0.2")),
)


@pytest.fixture
def place(tmp_path: Path) -> qsnap.Place:
    return qsnap.Place(tmp_path / "run", tmp_path / "store")


def test_it_is_found_by_name(place: qsnap.Place) -> None:
    assert spread_of("lab", place) is None
    assert spreads(place) == ()
    remember(VNE_ON_TWO, place)
    assert spread_of("lab", place) == VNE_ON_TWO
    assert spreads(place) == (VNE_ON_TWO,)


def test_one_without_hosts_is_forgotten(place: qsnap.Place) -> None:
    remember(VNE_ON_TWO, place)
    remember(VNE("lab", (VM("x", 1),)), place)
    assert spread_of("lab", place) is None


def test_what_was_known_is_known_again_after_a_failure(place: qsnap.Place) -> None:
    other = evolve(VNE_ON_TWO, vms=VNE_ON_TWO.vms[:1])
    with pytest.raises(KeyError), remembered(VNE_ON_TWO, place):
        raise KeyError
    assert spread_of("lab", place) is None
    with remembered(VNE_ON_TWO, place):
        assert spread_of("lab", place) == VNE_ON_TWO
    with pytest.raises(KeyError), remembered(other, place):
        raise KeyError
    assert spread_of("lab", place) == VNE_ON_TWO
    with pytest.raises(qsnap.InDoubtError), remembered(other, place):
        raise qsnap.InDoubtError("nobody knows")
    assert spread_of("lab", place) == other


@pytest.mark.parametrize("content", ["", "{}", '{"name": 3}', "[" * 100_000])
def test_damage_is_named(place: qsnap.Place, content: str) -> None:
    remember(VNE_ON_TWO, place)
    path = place.store / "lab/spread.json"
    path.write_text(content)
    with pytest.raises(qsnap.HostError, match="damaged") as caught:
        spread_of("lab", place)
    assert caught.value.where == str(path)
    assert "LAB.toml" in caught.value.advice


def test_names_do_not_lead_out(place: qsnap.Place) -> None:
    with pytest.raises(qsnap.StateError, match="not a name"):
        spread_of("../lab", place)


async def test_a_vne_whose_hosts_do_not_answer_hides_no_other(
    place: qsnap.Place, caplog: pytest.LogCaptureFixture
) -> None:
    qsnap_identity = place.identity
    assert not qsnap_identity.exists()
    remember(VNE_ON_TWO, place)
    (found,) = await qsnap.statuses(place=place)
    assert (found.name, found.vms) == ("lab", ())
    assert await qsnap.recover(place=place) == ()
    assert "VNE lab: " in caplog.text
    assert "identity" in found.notes[0]
