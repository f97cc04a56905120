"""The demo's closing table, and what it concludes from the numbers."""

from __future__ import annotations

from dataclasses import replace

from memos_vllm.demo.report import Results, conclusion, span, table_rows, unused_memory
from memos_vllm.demo.timing import Measurement, Sample


def results() -> Results:
    return Results(
        scratch=Measurement("from scratch", [Sample(2.0, 0, "none"), Sample(3.0, 0, "none")]),
        plain_warm=Measurement("plain, warm", [Sample(0.25, 3200, "-")]),
        resident=Measurement("cube", [Sample(s, 3200, "resident") for s in (0.2, 0.25, 9.0)]),
        plain_flooded=Measurement("plain, flooded", [Sample(2.5, 0, "-")]),
        flooded=Measurement(
            "cube, flooded", [Sample(0.25, 3200, "resident"), Sample(0.25, 3072, "store")]
        ),
        restarted=Measurement("cube, restarted", [Sample(0.5, 3200, "store")]),
    )


def test_each_row_holds_the_median_its_ratio_and_what_the_server_reported() -> None:
    head, *rows = table_rows(results())

    assert len(head) == 6
    assert rows[0] == ("from scratch", "2.50 s", "1.0 x", "0", "none", "2")
    assert rows[2] == ("cube", "250 ms", "10.0 x faster", "3,200", "resident", "3")
    assert rows[4][3:] == ("3,072-3,200", "resident, store", "2")


def test_the_conclusion_names_the_numbers() -> None:
    sentence = conclusion(results())

    assert "the first token came 10.0 times sooner than with the same text" in sentence
    assert "plain vLLM had lost its prefix and the cube still had 3,072-3,200 tokens" in sentence
    assert "took 3,200 tokens from the store" in sentence
    assert sentence.endswith("its first token came 5.0 times sooner than from scratch.")


def test_the_conclusion_claims_nothing_that_was_not_seen() -> None:
    kept = replace(
        results(),
        plain_flooded=Measurement("plain, flooded", [Sample(0.3, 1280, "-")]),
        restarted=Measurement("cube, restarted", [Sample(5.0, 0, "computed")]),
    )
    sentence = conclusion(kept)

    assert "plain vLLM still had a part of its prefix" in sentence
    assert "the store" not in sentence
    assert sentence.endswith("its first token took 2.0 times as long as from scratch.")


def test_a_cube_whose_kv_was_not_reused_is_named() -> None:
    assert unused_memory(results()) == []

    broken = replace(results(), restarted=Measurement("restarted", [Sample(2.5, 0, "computed")]))
    assert unused_memory(broken) == ["restarted"]


def test_a_span_is_one_number_when_all_are_equal() -> None:
    assert span([1024, 1024]) == "1,024"
    assert span([512, 0, 1024]) == "0-1,024"
