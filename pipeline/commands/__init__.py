"""One file a verb. Stages are imported inside the verb: `fpt --help` waits for no torch."""
