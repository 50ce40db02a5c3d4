"""Whether work can ever fit on nodes, and the line of a gang that waits."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.executors.ray_room import describe, places, refuse

NODES = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 4.0}, {"CPU": 64.0}, {"memory": 4e9}]


@settings(deadline=None, max_examples=40)
@given(cpu=st.integers(0, 9), gpu=st.integers(0, 3), count=st.integers(1, 12))
def test_places_are_as_many_as_can_be_put_one_by_one(cpu: int, gpu: int, count: int) -> None:
    free, put = [dict(node) for node in NODES], 0
    for _ in range(count if cpu or gpu else 0):
        for node in free:
            if node.get("CPU", 0) >= cpu and node.get("GPU", 0) >= gpu:
                node["CPU"], node["GPU"] = node.get("CPU", 0) - cpu, node.get("GPU", 0) - gpu
                put += 1
                break
    assert put == min(places(NODES, {"CPU": cpu, "GPU": gpu}), count)


def test_a_line_says_what_is_wanted_what_there_is_and_what_others_have() -> None:
    wanted, total = {"CPU": 2, "GPU": 1}, {"CPU": 16.0, "GPU": 4.0}
    line = "waiting for room in the Ray cluster: 2 ranks with 2 CPU and 1 GPU each; 2 nodes with 16 CPU (9 taken) and 4 GPU "
    assert describe(wanted, 2, 2, total, {"CPU": 7.0, "GPU": 1.0}, True) == f"{line}(3 taken)"
    # What is all taken is not named among the free resources at all.
    assert describe(wanted, 2, 2, total, {"CPU": 7.0}, True) == f"{line}(4 taken)"
    scattered = describe(wanted, 2, 2, total, {"CPU": 7.0, "GPU": 3.0}, True)
    assert scattered == f"{line}(1 taken); what a rank asks for must be free on one node"
    lost = describe(wanted, 1, 1, {"CPU": 2.0}, {"CPU": 2.0}, False)
    assert lost == (
        "waiting for room in the Ray cluster: 1 rank with 2 CPU and 1 GPU each; 1 node with 2 CPU (0 taken) and 0 GPU "
        "(0 taken): a node has to join first"
    )


def test_a_refusal_names_what_is_asked_for_and_the_most_there_is() -> None:
    assert refuse("task a of embed", {"CPU": 65, "memory": 5e9}, NODES).message == (
        "no node of the Ray cluster can hold task a of embed: it asks for CPU 65 (most on one node 64), "
        "memory 5,000,000,000 (most on one node 4,000,000,000)"
    )
    assert refuse("the 4 ranks of train", {"CPU": 2, "GPU": 2}, NODES, 4).message == (
        "the Ray cluster can never hold the 4 ranks of train: each asks for CPU 2 (most on one node 64), "
        "GPU 2 (most on one node 4), and its 4 nodes have room for 2 of 4 even when nothing else runs there"
    )
