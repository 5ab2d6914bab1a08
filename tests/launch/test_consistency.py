"""What must be equal on all machines of a run, and how differences are said."""

from __future__ import annotations

from pathlib import Path

from bigtx.launch.consistency import (
    MOST_SHOWN,
    differences,
    facts_of_machine,
    facts_of_settings,
    file_for_all,
    named,
    sees,
    why_different,
    why_wrong_clock,
)


def test_a_machine_is_like_itself() -> None:
    facts = facts_of_machine()
    assert facts == facts_of_machine() and {"bigtx", "Python", "torch", "deepspeed", "code"} <= facts.keys()
    assert all(isinstance(value, str) for value in facts.values())


def test_the_rarest_value_is_named_first() -> None:
    same = {"torch": "2.13.0", "Python": "3.11.7"}
    facts = {node: same for node in range(4)} | {2: same | {"torch": "2.12.0"}}
    assert differences(facts) == {"torch": {"2.12.0": [2], "2.13.0": [0, 1, 3]}}
    said = why_different({node: f"n{node + 1}" for node in range(4)}, facts)
    assert said and "torch is 2.12.0 on n3 (node 2) and 2.13.0 on n1 (node 0), n2 (node 1), n4 (node 3)." in said


def test_what_a_machine_does_not_know_is_no_difference() -> None:
    assert differences({0: {"commit": "abc", "code": "1"}, 1: {"code": "1"}}) == {}


def test_changes_of_the_code_alone_are_a_difference() -> None:
    hosts = {0: "a", 1: "b"}
    said = why_different(hosts, {0: {"commit": "abc", "code": "1"}, 1: {"commit": "abc", "code": "2"}})
    assert said and "code is 1 on a (node 0) and 2 on b (node 1)" in said
    said = why_different(hosts, {0: {"commit": "abc", "code": "1"}, 1: {"commit": "def", "code": "2"}})
    assert said and "commit is" in said and "code is" not in said


def test_settings_are_compared_one_by_one() -> None:
    one = facts_of_settings({"train": {"max_steps": 30, "none": None}, "data": {"sources": {}}, "list": ["x" * 99, 1]})
    two = facts_of_settings({"train": {"max_steps": 20, "none": None}, "data": {"sources": {}}, "list": ["x" * 99, 2]})
    assert list(differences({0: one, 1: two})) == ["train.max_steps", "list"]
    assert all(len(value) <= 60 for value in one.values())


def test_many_differences_and_machines_are_cut_short() -> None:
    hosts = {node: f"n{node}" for node in range(128)}
    said = why_different(hosts, {node: {f"fact {k}": str(node == 5) for k in range(20)} for node in hosts})
    assert said and f"; {20 - MOST_SHOWN} more differ. " in said and len(said) < 2000
    assert named(hosts, hosts).endswith(f"n{MOST_SHOWN - 1} (node {MOST_SHOWN - 1}) and {128 - MOST_SHOWN} more")


def test_a_clock_may_be_off_by_some_seconds() -> None:
    hosts = {0: "a", 1: "b", 2: "c"}
    assert why_wrong_clock(hosts, {1: 3.0, 2: -4.0}) is None
    said = why_wrong_clock(hosts, {1: 3.0, 2: -7300.0})
    assert said and "c (node 2) by -7,300 s" in said and "b (node" not in said


def test_the_file_for_all_is_in_the_nearest_folder_and_goes_away(tmp_path: Path) -> None:
    with file_for_all(tmp_path / "runs" / "a") as path:
        assert path and path.parent == tmp_path and sees(path, 0)
    assert not sees(path, 0) and list(tmp_path.iterdir()) == []
    (tmp_path / "runs" / "a").mkdir(parents=True)
    with file_for_all(tmp_path / "runs" / "a") as path:
        assert path and path.parent == tmp_path / "runs" / "a"
