"""Files in and out: model folders, deltas, model cards, results, here and at URLs."""
