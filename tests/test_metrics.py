"""The measures agree with scikit-learn, scipy and counting by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.evaluation import metrics
from plait.modalities.image import psnr


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_classification_agrees_with_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    truth, predicted = random(1).integers(0, 6, 300), random(2).integers(0, 7, 300)
    found = metrics.classification(truth, predicted, 8)  # class 7 never occurs: no part of the macro figures
    precision, recall, f1, _ = sklearn.precision_recall_fscore_support(truth, predicted, zero_division=0)
    assert found.accuracy == pytest.approx(sklearn.accuracy_score(truth, predicted))
    np.testing.assert_allclose(found.precision[:7], precision)
    np.testing.assert_allclose(found.recall[:7], recall)
    np.testing.assert_allclose(found.f1[:7], f1)
    assert found.macro_f1 == pytest.approx(sklearn.f1_score(truth, predicted, average="macro"))
    np.testing.assert_array_equal(found.confusion[:7, :7], sklearn.confusion_matrix(truth, predicted))


def test_standard_errors_match_their_formulas_and_repeat() -> None:
    values = random(3).random(400)
    mean, error = metrics.mean_with_error(values)
    assert mean == values.mean()
    assert error == pytest.approx(values.std() / math.sqrt(400), rel=0.15)
    assert metrics.mean_with_error(values) == (mean, error)
    assert math.isnan(metrics.mean_with_error(np.zeros(0))[0])
    ratio, error = metrics.ratio_with_error(values * 2, values)
    assert (ratio, error) == (pytest.approx(2), pytest.approx(0, abs=1e-9))
    truth = random(4).integers(0, 4, 500)
    errors = metrics.macro_errors(truth, np.where(values[0] < 2, truth, 0), 4)
    assert errors == {"precision": 0, "recall": 0, "f1": 0}
    # Small steps draw the same resamples as one large one.
    statistic = lambda rows: values[rows].mean(1)  # noqa: E731
    assert metrics.bootstrap(statistic, 400, cells=1) == pytest.approx(metrics.bootstrap(statistic, 400))


@given(st.text("ab c", max_size=12), st.text("ab c", max_size=12), st.text("ab c", max_size=12))
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    def naive(x: str, y: str) -> int:
        table = np.add.outer(np.arange(len(x) + 1), np.arange(len(y) + 1))
        for i in range(len(x)):
            for j in range(len(y)):
                table[i + 1, j + 1] = min(table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + (x[i] != y[j]))
        return int(table[-1, -1])

    assert metrics.edit_distance(a, b) == metrics.edit_distance(b, a) == naive(a, b)
    assert metrics.edit_distance(a, c) <= metrics.edit_distance(a, b) + metrics.edit_distance(b, c)


def test_error_rates_count_words_and_characters() -> None:
    rates = metrics.error_rates(["the cat sat", "三"], ["the cat", "四"])
    assert [part.tolist() for part in rates["wer"]] == [[1, 1], [3, 1]]
    assert [part.tolist() for part in rates["cer"]] == [[4, 1], [11, 1]]
    assert metrics.ratio_with_error(*rates["wer"])[0] == pytest.approx(0.5)
    assert metrics.bits_per_byte(math.log(2) * 24, ["三"]) == pytest.approx(8)


def test_retrieval_agrees_with_sorting_each_query() -> None:
    queries, gallery = random(5).normal(size=(37, 8)), random(6).normal(size=(50, 8))
    relevance = random(7).random((37, 50)) < 0.1
    found = metrics.retrieval(queries, gallery, lambda a, b: relevance[a:b], chunk=10)
    for row in range(37):
        order = sorted(range(50), key=lambda j: -float(queries[row] @ gallery[j]))
        assert found["top"][row].tolist() == order[:10]
        assert found["r_at_5"][row] == any(relevance[row, order[:5]])
        assert found["p_at_10"][row] == pytest.approx(relevance[row, order[:10]].mean())
    shuffled = np.mean([
        relevance[:, random(s).permutation(50)[:5]].any(1).mean() for s in range(2000)
    ])  # fmt: skip
    assert metrics.retrieval_chance(relevance.sum(1), 50, 5)[0] == pytest.approx(shuffled, abs=0.02)


def test_retrieval_in_a_gallery_smaller_than_the_cutoff() -> None:
    found = metrics.retrieval(np.eye(3), np.eye(3), lambda a, b: np.eye(3, dtype=bool)[a:b])
    assert found["r_at_1"].tolist() == [1, 1, 1]
    assert found["p_at_10"] == pytest.approx(1 / 3)
    assert metrics.retrieval_chance(np.ones(3), 3, 10) == (1.0, pytest.approx(1 / 3))


def test_frechet_distance_agrees_with_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a = random(8).normal(size=(200, 5)) @ random(9).normal(size=(5, 5))
    b = random(10).normal(size=(150, 5)) + 1
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(first @ second).real
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(wanted)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    # Fewer samples than dimensions: singular, but defined.
    assert math.isfinite(metrics.frechet_distance(a[:3], b[:3]))


def test_diversity_and_nearest() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    real, labels = random(11).normal(size=(60, 4)), np.arange(60) % 3
    wanted = np.mean([distance.pdist(real[labels == c]).mean() for c in range(3)])
    assert metrics.spread(real, labels) == pytest.approx(wanted)
    assert metrics.diversity(real / 2, labels, real, labels) == pytest.approx(0.5)
    assert metrics.diversity(np.zeros_like(real), labels, real, labels) == 0
    distances, places = metrics.nearest(real[:20], real[10:], chunk=7)
    table = distance.cdist(real[:20], real[10:])
    np.testing.assert_array_equal(places, table.argmin(1))
    np.testing.assert_allclose(distances, table.min(1), atol=1e-5)
    assert distances[10:].max() == 0


def test_psnr_and_code_use() -> None:
    image = random(12).integers(0, 200, (2, 8, 8, 1))
    found = psnr(image, image + np.array([0, 10]).reshape(2, 1, 1, 1))
    assert found == pytest.approx([100, 20 * math.log10(255 / 10)])
    assert metrics.code_use(np.array([[0, 1], [2, 3]]), 8) == (0.5, pytest.approx(0.5))
    assert metrics.code_use(np.zeros(5, int), 10) == (0.1, pytest.approx(0.1))
