import pytest

from kdzoo.errors import KdzooError
from kdzoo.evaluate.rouge import mean_score, rouge_l


def test_equal_texts_score_100_and_disjoint_texts_score_0():
    assert rouge_l(["a quick fox", "one two"], [["a quick fox"], ["three four"]]) == [100.0, 0.0]


def test_the_score_is_the_f_measure_of_the_longest_common_subsequence():
    # "the cat mat" is common: recall 3/6, precision 3/4.
    (score,) = rouge_l(["the cat has mat"], [["the cat sat on the mat"]])
    assert score == pytest.approx(100 * 2 * (3 / 6) * (3 / 4) / (3 / 6 + 3 / 4))


def test_words_are_stemmed_and_case_and_punctuation_do_not_count():
    assert rouge_l(["Running, foxes!"], [["run fox"]]) == [pytest.approx(100.0)]


def test_the_best_reference_counts():
    assert rouge_l(["b c"], [["x y", "b c", "b"]]) == [pytest.approx(100.0)]


def test_an_empty_answer_scores_0():
    assert rouge_l([""], [["something"]]) == [0.0]


@pytest.mark.parametrize("references", [[["a"]], [["a"], ["b"], ["c"]]])
def test_a_length_mismatch_is_an_error_and_not_cut_off(references):
    with pytest.raises(KdzooError, match=f"2 predictions for {len(references)} rows"):
        rouge_l(["a", "b"], references)


def test_a_row_without_references_is_an_error_that_names_the_row():
    with pytest.raises(KdzooError, match="row 1 has no reference"):
        rouge_l(["a", "b"], [["a"], []])


def test_the_mean_is_over_rows_and_needs_one():
    assert mean_score([100.0, 0.0, 50.0]) == 50.0
    with pytest.raises(KdzooError, match="no row was scored"):
        mean_score([])
