"""Result files and the table."""

import json

import pytest

from repkit.checks import InputError
from repkit.evaluate import Result, append_results, format_table, read_results

RETRIEVAL = Result("two_tower", "digit_scenes/test", "retrieval", {"text_to_image/R@1": 0.974})
ZERO_SHOT = Result("two_tower", "digit_scenes/test", "zero_shot", {"top_1": 0.91, "top_5": 0.99})


def test_one_json_line_per_result(tmp_path):
    path = tmp_path / "run" / "results.jsonl"
    append_results([RETRIEVAL], path)
    append_results([ZERO_SHOT], path)
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {
        "model": "two_tower",
        "data": "digit_scenes/test",
        "task": "retrieval",
        "metrics": {"text_to_image/R@1": 0.974},
        "step": None,
    }
    assert read_results(path) == [RETRIEVAL, ZERO_SHOT]


def test_a_later_line_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "results.jsonl"
    again = Result(RETRIEVAL.model, RETRIEVAL.data, RETRIEVAL.task, {"text_to_image/R@1": 0.5})
    append_results([RETRIEVAL, ZERO_SHOT, again], path)
    assert read_results(path) == [again, ZERO_SHOT]


def test_nan_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_results([RETRIEVAL, Result("m", "d", "t", {"top_1": float("nan")})], path)
    assert not path.exists()


@pytest.mark.parametrize("line", ["{", "[1]", '{"model": "m"}', "3"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    append_results([RETRIEVAL], path)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=r"results\.jsonl line 2 is not a result"):
        read_results(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no file"):
        read_results(tmp_path / "results.jsonl")


def test_the_step_is_kept_and_older_lines_have_none(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"model": "m", "data": "d", "task": "old", "metrics": {}}\n{"model": "m", "da')
    append_results([Result("m", "d", "t", {}, step=700)], path)
    assert [result.step for result in read_results(path)] == [None, 700]


def test_table_rows_of_a_task_stay_together_and_columns_align():
    other = Result("a much longer name", "digit_scenes/test", "retrieval", {"text_to_image/R@5": 1.0})
    table = format_table([RETRIEVAL, ZERO_SHOT, other]).splitlines()
    assert [line.split() for line in table[2:6]] == [
        ["digit_scenes/test", "retrieval", "text_to_image/R@1", "97.4", "%", "-"],
        ["text_to_image/R@5", "-", "100.0", "%"],
        ["zero_shot", "top_1", "91.0", "%", "-"],
        ["top_5", "99.0", "%", "-"],
    ]
    assert len({len(line) for line in table[1:6]}) == 1


def test_shares_are_percent_and_the_rest_is_not():
    metrics = {"top_1": 0.5, "image_to_text/median_rank": 2.0, "inverse_penalty": 100.0, "1_shot/accuracy": 0.25}
    table = format_table([Result("m", "d", "t", metrics | {"1_shot/accuracy_interval": 0.031})])
    shown = [line.split("  ")[-1].strip() for line in table.splitlines()[2:-1]]
    assert shown == ["50.0 %", "2", "100", "25.0 ± 3.1 %"]
    assert "_interval" not in table
