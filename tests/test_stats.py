"Intervals, pairing and serialisation of estimates."
