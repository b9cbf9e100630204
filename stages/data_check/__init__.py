"""Check and repair a data set: contents, defects, copies, leaks between splits, suspected shortcuts."""
