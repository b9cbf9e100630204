"""Stage one: the frozen LPM, token importance, selection, and the run that fills the store."""
