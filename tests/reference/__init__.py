"""Our computation against tensors that the authors' own code produced: `python -m tests.reference DIR`."""
