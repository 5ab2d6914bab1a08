"""Metrics of predicted classes and their probabilities."""

from __future__ import annotations

import numpy as np

CALIBRATION_BINS = 15
"""The number of bins, of equal width as in arXiv:1706.04599."""


def confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the confusion matrix, int64 [classes, classes]: rows are true classes, columns predicted ones."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def macro_f1(matrix: np.ndarray) -> float:
    """Return the mean over classes of 2 TP / (2 TP + FP + FN), without classes that neither occur nor are predicted."""
    hits = np.diag(matrix)
    total = matrix.sum(axis=0) + matrix.sum(axis=1)
    present = total > 0
    return float((2 * hits[present] / total[present]).mean()) if present.any() else 0.0


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error (arXiv:1706.04599, equation 3): the mean gap of confidence and accuracy.

    Args:
        probabilities: fp64 [N, classes].
        labels: int [N].
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / max(1, len(labels)))
