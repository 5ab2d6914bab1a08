from __future__ import annotations

import numpy as np
import pytest

from bigtx.finetuning.tasks.classify import calibration_error, confusion, macro_f1


def test_confusion_has_a_row_for_each_class() -> None:
    matrix = confusion(np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 2, 0]), 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_macro_f1_by_hand() -> None:
    matrix = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    # Class 0: 2*1 / (2 + 2); class 1: 2*1 / (2 + 1); class 2: 2*1 / (1 + 2); class 3 is nowhere.
    assert macro_f1(matrix) == pytest.approx((0.5 + 2 / 3 + 2 / 3) / 3)
    assert macro_f1(np.zeros((2, 2), int)) == 0.0
    never_predicted = np.array([[2, 0], [2, 0]])
    assert macro_f1(never_predicted) == pytest.approx((4 / 6 + 0) / 2)


def test_calibration_error_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    labels = np.array([0, 1, 1, 1])
    # Of ten bins, one holds confidence 0.9 with half of it right, one 0.6 with all right.
    expected = 0.5 * abs(0.5 - 0.9) + 0.5 * abs(1.0 - 0.6)
    assert calibration_error(probabilities, labels, num_bins=10) == pytest.approx(expected)
    sure = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert calibration_error(sure, np.array([0, 1])) == 0.0
    assert calibration_error(sure, np.array([1, 0])) == 1.0
