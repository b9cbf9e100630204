"""The frozen LPM: catalogue, weights, key map, hub, loading, attention."""
