"""From sampling parameters to tokens: admission checks, seeds, stop strings, log-probabilities."""
