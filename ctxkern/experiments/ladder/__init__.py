"""From averaging to attention: `averaging.py` has four ways to the same mean, of which the last one learns its weights;
`rungs.py` the language models from bigrams to a transformer, each the one before and one part more."""
