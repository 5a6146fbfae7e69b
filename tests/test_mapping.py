"""Which student layer learns from which teacher layer, worked out by hand."""

from fractions import Fraction
from itertools import pairwise

import pytest

from hf_distill import LayerMapping

BY_HAND = {
    (1, 12): {1: 12},
    (2, 4): {1: 2, 2: 4},
    (3, 12): {1: 4, 2: 8, 3: 12},
    (4, 4): {1: 1, 2: 2, 3: 3, 4: 4},
    (4, 6): {1: 2, 2: 3, 3: 5, 4: 6},  # 1.5, 3, 4.5, 6: halves go up
    (4, 12): {1: 3, 2: 6, 3: 9, 4: 12},
    (5, 12): {1: 2, 2: 5, 3: 7, 4: 10, 5: 12},  # 2.4, 4.8, 7.2, 9.6, 12
    (6, 12): {1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12},
    (6, 15): {1: 3, 2: 5, 3: 8, 4: 10, 5: 13, 6: 15},  # 2.5, 5, 7.5, 10, 12.5, 15
}


@pytest.mark.parametrize("layers", BY_HAND)
def test_uniform_is_as_worked_out_by_hand(layers):
    assert dict(LayerMapping.uniform().resolve(*layers)) == BY_HAND[layers]


@pytest.mark.parametrize("teacher_layers", [1, 2, 5, 12, 24, 33])
def test_uniform_is_even_strictly_increasing_and_ends_on_the_last_layer(teacher_layers):
    for student_layers in range(1, teacher_layers + 1):
        pairs = LayerMapping.uniform().resolve(student_layers, teacher_layers)
        teachers = [teacher for _, teacher in pairs]
        assert [student for student, _ in pairs] == list(range(1, student_layers + 1))
        assert teachers[-1] == teacher_layers
        assert all(earlier < later for earlier, later in pairwise(teachers))
        assert all(abs(t - Fraction(s * teacher_layers, student_layers)) <= Fraction(1, 2) for s, t in pairs)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((2, 6), {1: 5, 2: 6}),
        ((6, 12), {k: k + 6 for k in range(1, 7)}),
        ((3, 3), {1: 1, 2: 2, 3: 3}),
        ((1, 1), {1: 1}),
    ],
)
def test_last_maps_on_the_teachers_last_blocks(layers, expected):
    assert dict(LayerMapping.last().resolve(*layers)) == expected


def test_pairs_are_kept_in_the_order_given():
    assert LayerMapping.pairs({3: 12, 1: 4, 0: 0}).resolve(3, 12) == ((3, 12), (1, 4), (0, 0))


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [({-1: -1}, ((3, 12),)), ({-4: -13}, ((0, 0),)), ({-2: 8, 3: -1}, ((2, 8), (3, 12))), ({0: -1}, ((0, 12),))],
)
def test_negative_indices_count_from_the_final_hidden_state(pairs, expected):
    assert LayerMapping.pairs(pairs).resolve(3, 12) == expected


@pytest.mark.parametrize(
    ("pairs", "side"),
    [({1: 4, 2: 4}, "teacher"), ({3: 1, -1: 2}, "student"), ({1: 12, 2: -1}, "teacher"), ({0: 0, -4: 1}, "student")],
)
def test_a_layer_used_twice_is_refused(pairs, side):
    with pytest.raises(ValueError, match=f"uses a {side} layer more than once"):
        LayerMapping.pairs(pairs).resolve(3, 12)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({4: 1}, "student hidden state 4, but the student has 3 layers"),
        ({-5: 1}, "student hidden state -5, but the student has 3 layers"),
        ({1: 13}, "teacher hidden state 13, but the teacher has 12 layers"),
        ({1: -14}, "teacher hidden state -14, but the teacher has 12 layers"),
    ],
)
def test_an_index_out_of_range_is_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        LayerMapping.pairs(pairs).resolve(3, 12)


@pytest.mark.parametrize("strategy", ["uniform", "last"])
def test_a_student_deeper_than_its_teacher_needs_explicit_pairs(strategy):
    with pytest.raises(ValueError, match="no more layers than the teacher, got 6 and 4"):
        LayerMapping.parse(strategy).resolve(6, 4)
    assert LayerMapping.pairs({6: 4}).resolve(6, 4) == ((6, 4),)


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        LayerMapping.pairs({})


@pytest.mark.parametrize("pairs", [{1.5: 2}, {1: 2.0}, {"1": 2}, {1: "2"}, {True: 2}, {1: None}])
def test_indices_that_are_not_whole_numbers_are_refused(pairs):
    with pytest.raises(ValueError, match="must be whole numbers"):
        LayerMapping.pairs(pairs)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("uniform", LayerMapping.uniform()),
        ("last", LayerMapping.last()),
        ("first", LayerMapping.first()),
        ({1: 4, 3: 12}, LayerMapping.pairs({1: 4, 3: 12})),
        ({"1": 4, "3": 12}, LayerMapping.pairs({1: 4, 3: 12})),  # what JSON makes of the keys
        ({"-1": -1}, LayerMapping.pairs({-1: -1})),
        (LayerMapping.pairs({0: 0}), LayerMapping.pairs({0: 0})),
    ],
)
def test_parse_takes_names_dicts_and_json_keys(value, expected):
    assert LayerMapping.parse(value) == expected


@pytest.mark.parametrize("value", ["middle", "", "Uniform", None, 3])
def test_parse_refuses_anything_else(value):
    with pytest.raises(ValueError, match="must be 'uniform', 'first', 'last' or a dict"):
        LayerMapping.parse(value)


@pytest.mark.parametrize("value", [{"one": 4}, {None: 4}, {"1": "four"}, {"1.5": 4}, {1.5: 4}, {}])
def test_parse_refuses_dicts_of_anything_but_whole_numbers(value):
    with pytest.raises(ValueError, match="layer_mapping must map whole numbers to whole numbers"):
        LayerMapping.parse(value)


@pytest.mark.parametrize(("value", "text"), [("uniform", "uniform"), ("last", "last"), ({1: 4}, "{1: 4}")])
def test_text_is_what_the_user_wrote(value, text):
    assert str(LayerMapping.parse(value)) == text


def test_first_maps_on_the_block_of_the_same_number():
    assert LayerMapping.first().resolve(3, 12) == ((1, 1), (2, 2), (3, 3))


def test_several_teacher_layers_for_one_student_layer():
    assert LayerMapping.pairs({1: (1, 2), -1: [3, -1]}).resolve(2, 5) == ((1, (1, 2)), (2, (3, 5)))
    assert LayerMapping.parse({"1": [1, 2]}) == LayerMapping.parse({1: (1, 2)})
    assert str(LayerMapping.parse({"1": [1, 2]})) == "{1: (1, 2)}"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({1: (1, 1)}, "uses a teacher layer more than once"),
        ({1: (1, 2), 2: 2}, "uses a teacher layer more than once"),
        ({1: (1, 7)}, "teacher hidden state 7, but the teacher has 5 layers"),
        ({1: ()}, "at least one teacher layer"),
        ({1: (1, 2.0)}, "must be whole numbers"),
        ({1: ("1",)}, "must be whole numbers"),
    ],
)
def test_bad_groups_of_teacher_layers_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        LayerMapping.pairs(pairs).resolve(2, 5)
