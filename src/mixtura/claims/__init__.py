"""One file a system: the paper's claim, its baseline, the run that checks it."""
