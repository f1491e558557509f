"""The grid of processes: coordinates, groups, layers of a pyramid, words of a layout, and what does not fit."""

import pytest

from mixtura.lm.parallel import make_mesh, parse_layout


def test_every_axis_cuts_the_world_into_groups_that_differ_in_that_coordinate_only():
    mesh = make_mesh(24, expert=3, slices=2, tensor=2)
    assert mesh.shape == (2, 3, 2, 2) and mesh.owners == 6
    for place, axis in enumerate(("expert_data", "expert", "slice", "tensor")):
        groups = mesh.ranks(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(24))
        for group in groups:
            seen = [mesh.coordinates(rank) for rank in group]
            assert [at[place] for at in seen] == list(range(mesh.shape[place]))
            assert len({at[:place] + at[place + 1 :] for at in seen}) == 1
    for group in mesh.ranks("owners"):
        assert [mesh.owner(rank) for rank in group] == list(range(6))


def test_the_processes_of_one_copy_are_neighbours():
    assert make_mesh(8, expert=4).ranks("expert") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert make_mesh(4, expert=2, slices=2).ranks("slice") == [[0, 1], [2, 3]]


def test_each_layer_of_a_pyramid_takes_as_many_processes_as_it_has_experts():
    # DeepSpeed-MoE's example: 128 processes, layers of 32, 64 and 128 experts.
    shapes = [make_mesh(128).for_experts(e).shape[:2] for e in (32, 64, 128)]
    assert shapes == [(4, 32), (2, 64), (1, 128)]
    assert make_mesh(8, tensor=2).for_experts(4).shape == (2, 2, 1, 2)


def test_the_two_steps_of_a_hierarchical_exchange_reach_every_owner():
    near, far = make_mesh(8, expert=8, node=4).near_and_far()
    assert near == [[0, 1, 2, 3], [4, 5, 6, 7]] and far == [[0, 4], [1, 5], [2, 6], [3, 7]]
    with pytest.raises(
        ValueError, match=r"as many processes of a group on every node; \[0, 1, 2\] lie on nodes \[0, 0, 1\]"
    ):
        make_mesh(6, expert=3, node=2).near_and_far()


def test_a_layout_in_words():
    assert parse_layout("expert=2,data=2", 4).shape == (2, 2, 1, 1)
    assert parse_layout(" data=4 ", 4).shape == (4, 1, 1, 1)
    assert parse_layout("expert=2", 8).shape == (4, 2, 1, 1)
    assert parse_layout("data=2,tensor=2", 8).shape == (2, 2, 1, 2)
    assert parse_layout("expert=2,slices=2", 4).shape == (1, 2, 2, 1)


@pytest.mark.parametrize(
    ("text", "world", "message"),
    [
        ("expert=2,data=2", 3, r"expert=2,data=2 needs 4 processes, and 3 are running; .*--nproc-per-node 4"),
        ("expert=2,data=2", 1, "needs 4 processes, and 1 is running"),
        ("expert=4", 6, "needs a multiple of 4 processes, and 6 are running"),
        ("data=3", 4, "data=3 needs 3 processes"),
        ("experts=2", 2, "made of expert=N, data=N, slices=N, tensor=N, separated by commas; got 'experts=2'"),
        ("expert", 2, "got 'expert'"),
        ("expert=2,expert=2", 2, "expert stands twice"),
        ("expert=two", 2, "expert must be a whole number of at least 1, got 'two'"),
        ("expert=0", 2, "expert must be a whole number of at least 1, got '0'"),
    ],
)
def test_a_layout_that_cannot_be_says_what_would_do(text, world, message):
    with pytest.raises(ValueError, match=message):
        parse_layout(text, world)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (
            {"world": 6, "expert": 4},
            "world=6 is not a multiple of expert=4 x tensor=1 x slices=1; a world of 4 or 8 would do",
        ),
        ({"world": 3, "tensor": 2}, "world=3 is not a multiple of tensor=2 x slices=1; a world of 2 or 4 would do"),
        ({"world": 0}, "world must be at least 1, got 0"),
        ({"world": 4, "expert": 0}, "expert must be at least 1, got 0"),
        ({"world": 4, "node": 3}, "node must divide world=4, got 3"),
    ],
)
def test_degrees_that_do_not_divide_the_world_say_which_worlds_fit(degrees, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**degrees)


def test_experts_that_do_not_divide_say_which_degree_would():
    with pytest.raises(
        ValueError, match="6 experts do not divide into equal parts for expert=4; expert=1 or 2 would do"
    ):
        make_mesh(4).for_experts(6)
    with pytest.raises(ValueError, match="3 experts do not divide into equal parts for expert=4; expert=1 would do"):
        make_mesh(4).for_experts(3)
    with pytest.raises(ValueError, match="1 experts do not spread over tensor=2"):
        make_mesh(4, tensor=2).for_experts(1)


def test_a_mesh_describes_without_a_process_group_and_says_what_a_group_of_it_needs():
    mesh = make_mesh(4, expert=2)
    assert mesh.coordinates(3) == (1, 1, 0, 0)
    with pytest.raises(
        RuntimeError, match="a mesh of 4 processes needs a process group; start with torchrun --nproc-per-node 4"
    ):
        mesh.group("expert")
    assert make_mesh(1).group("expert") is None and make_mesh(1).rank == 0
