"""The benchmark: bin/bench. Each work measures one thing with real worker processes, and checks every run."""
