"""Stage two: fusion, side network, training loop, model bundle and cost."""
